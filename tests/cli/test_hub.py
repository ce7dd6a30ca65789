"""Bundles on the hub: pushed in one commit, fetched by their manifest, run by their name. The hub is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Repository, fake_hub

NAME = "org/tiny.bundle"
CLI = "from cushion_deploy.cli.main import main; main()"
FOLDER = "from huggingface_hub import snapshot_download as s; print(s(sys.argv[1], local_dir=sys.argv[2]))"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as served:
        yield served


@pytest.fixture(scope="module")
def run(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the command line in a process that knows this hub only."""
    home = tmp_path_factory.mktemp("home")
    root = str(Path(__file__).parents[2])

    def child(*arguments: object, code: str = CLI, **more: str) -> Any:
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        # Xet, through which the real hub takes large files, needs its servers; without it they go through LFS.
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **own, **more}
        command = [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    return child


@pytest.fixture(scope="module")
def pushed(run: Run, tiny_bundle: Any) -> Any:
    done = run("push", tiny_bundle.bundle, NAME, "--private", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def remote(hub: FakeHub, name: str = NAME) -> dict[str, bytes]:
    return hub.repositories[name].commits[-1][1]


def test_a_push_is_one_commit_of_exactly_the_bundle(hub: FakeHub, pushed: Any, tiny_bundle: Any) -> None:
    folder = tiny_bundle.bundle
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = remote(hub)
    assert {name: found[name] for name in found if name != ".gitattributes"} == files
    assert hub.repositories[NAME].private
    # huggingface_hub lets the hub validate a model card before it commits it.
    assert hub.cards == [files["README.md"].decode()]
    assert pushed["commit"] == hub.repositories[NAME].commits[1][0]


def test_the_name_is_as_good_as_the_folder(hub: FakeHub, pushed: Any, run: Run, cli: Any, tiny_bundle: Any) -> None:
    options = ("A head attends", "--max-new-tokens", 6, "--json")
    done = run("generate", NAME, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == cli("generate", tiny_bundle.bundle, *options).json["token_ids"]
    # Once fetched, nothing is fetched again, by commit or offline, and only what the manifest lists was fetched.
    assert ".gitattributes" not in hub.fetched
    before = list(hub.fetched)
    assert run("verify", f"{NAME}@{pushed['commit']}").returncode == 0
    for verb in ("inspect", "report"):
        named, folder = run(verb, NAME, "--json"), cli(verb, tiny_bundle.bundle, "--json")
        assert (named.returncode, json.loads(named.stdout)) == (0, folder.json), named.stderr
    offline = run("generate", NAME, *options, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["token_ids"] == json.loads(done.stdout)["token_ids"]
    assert hub.fetched == before


def test_what_was_fetched_is_proven_like_a_folder(pushed: Any, run: Run, tiny_bundle: Any) -> None:
    done = run("parity", NAME, "--work-dir", tiny_bundle.work, "--json")  # a snapshot is a folder of links
    assert done.returncode == 0, done.stderr
    assert {check["passed"] for check in json.loads(done.stdout)["checks"]} == {True}
    options = ("--columns", "engine", "--max-tokens", 64, "--json", "--work-dir", tiny_bundle.work)
    named, folder = run("eval", NAME, *options), run("eval", tiny_bundle.bundle, *options)
    assert (named.returncode, json.loads(named.stdout)["texts"]) == (0, json.loads(folder.stdout)["texts"]), (
        named.stderr
    )


def test_a_folder_fetched_by_the_hubs_own_command_is_a_bundle(pushed: Any, run: Run, tmp_path: Path) -> None:
    fetched = run(NAME, tmp_path / "local", code=FOLDER)
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "local" / ".gitattributes").is_file()
    done = run("verify", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    assert "not compared, because no run reads them" in done.stdout
    assert ".gitattributes (added)" in done.stdout


def test_a_later_push_removes_what_only_the_earlier_bundle_had(
    hub: FakeHub, pushed: Any, run: Run, tiny_bundle: Any
) -> None:
    repository = hub.repositories["org/old"] = Repository()
    plan = "engines/old/plan.engine"
    theirs = {"LICENSE": b"y", ".gitattributes": b"z", "pytorch/model.safetensors": b"w"}
    repository.commit({**listing(remote(hub), plan), plan: b"x", **theirs})
    done = run("push", tiny_bundle.bundle, "org/old")
    assert done.returncode == 0, done.stderr
    assert "1 of an earlier bundle removed" in done.stdout
    assert "names the path" in done.stderr
    found = remote(hub, "org/old")
    assert set(found) == set(remote(hub)) | set(theirs)
    assert {name: found[name] for name in theirs} == theirs
    assert found["cushion.json"] == remote(hub)["cushion.json"]


def test_a_signature_travels_with_the_bundle(hub: FakeHub, pushed: Any, run: Run, copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key, private, public = ec.generate_private_key(ec.SECP256R1()), tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo),
    )
    assert run("sign", copy, "--key", private).returncode == 0
    assert run("push", copy, "org/signed").returncode == 0
    assert remote(hub, "org/signed")["model.sig"] == (copy / "model.sig").read_bytes()
    assert run("verify", NAME, "--public-key", public).returncode == 4, "nobody signed that one"
    done = run("verify", "org/signed", "--signature", "--public-key", public)
    assert done.returncode == 0, done.stderr
    assert "signed with the private key of" in done.stdout
    # A signature of the earlier bundle would be wrong for the next one.
    (copy / "model.sig").unlink()
    assert run("push", copy, "org/signed").returncode == 0
    assert "model.sig" not in remote(hub, "org/signed")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"a", "model.safetensors": b"w"}, "'model.safetensors'), and no cushion.json"),
        ({"cushion.json": b"{}", "model.safetensors": b"w"}, "is not known: cushion.json has no valid schema"),
    ],
)
def test_a_repository_of_something_else_is_left_alone(
    hub: FakeHub, pushed: Any, run: Run, tiny_bundle: Any, files: dict[str, bytes], words: str
) -> None:
    repository = hub.repositories["org/checkpoint"] = Repository()
    repository.commit(files)
    done = run("push", tiny_bundle.bundle, "org/checkpoint")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(repository.commits) == 1


def test_a_repository_with_documents_only_is_free(hub: FakeHub, pushed: Any, run: Run, tiny_bundle: Any) -> None:
    hub.repositories["org/free"] = Repository()
    hub.repositories["org/free"].commit({"README.md": b"a", "LICENSE": b"y"})
    done = run("push", tiny_bundle.bundle, "org/free")
    assert done.returncode == 0, done.stderr
    assert remote(hub, "org/free")["LICENSE"] == b"y"


def test_a_damaged_bundle_is_not_sent_and_a_damaged_file_not_run(
    hub: FakeHub, pushed: Any, run: Run, copy: Path
) -> None:
    data = bytearray((copy / "model.onnx").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx").write_bytes(data)
    assert run("push", copy, "org/damaged").returncode == 4
    assert "org/damaged" not in hub.repositories
    repository = hub.repositories["org/damaged"] = Repository()
    repository.commit({**remote(hub), "model.onnx": bytes(data)})
    done = run("generate", "org/damaged", "a")
    assert done.returncode == 4
    assert "model.onnx" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "more", "code", "words"),
    [
        (("verify", "org/nowhere"), {}, 2, "does not exist or is not open to you"),
        (("verify", "models/out--int8"), {}, 2, "models/out--int8 does not exist"),
        (("generate", "out/bundle.", "a"), {}, 2, "out/bundle. does not exist"),
        (("verify", "out/bundle.git"), {}, 2, "out/bundle.git does not exist"),
        (("chat", f"out/{'b' * 96}"), {}, 2, "does not exist"),
        (("push", "BUNDLE", "org/a--b"), {}, 2, "'org/a--b' is not the name of a repository"),
        (("verify", f"{NAME}@v9"), {}, 2, "no such revision"),
        (("verify", "org/plain"), {}, 2, "is not a bundle: it has no cushion.json"),
        (("chat", "org/pickled"), {}, 4, "lists the pickle 'evil.bin'"),
        (("verify", "org/unreached"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, 3, "the hub cannot be reached"),
        (("verify", "org/offline"), {"HF_HUB_OFFLINE": "1"}, 3, "the hub cannot be reached"),
        (("push", "BUNDLE", "org/mine"), {"HF_TOKEN": "hf_wrong"}, 2, "refuses access to 'org/mine' (401)"),
        (("push", "BUNDLE", "mine"), {}, 2, "'mine' is not the name of a repository"),
    ],
)
def test_what_goes_wrong_is_said(
    hub: FakeHub, pushed: Any, run: Run, tiny_bundle: Any, arguments: Any, more: dict[str, str], code: int, words: str
) -> None:
    for name, files in (("org/plain", {"config.json": b"{}"}), ("org/pickled", pickled(remote(hub)))):
        hub.repositories[name] = Repository()
        hub.repositories[name].commit(files)
    done = run(*[tiny_bundle.bundle if a == "BUNDLE" else a for a in arguments], **more)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "evil.bin" not in hub.fetched


def test_a_name_that_only_the_library_refuses_is_bad_input() -> None:
    from huggingface_hub.errors import HFValidationError

    from cushion_deploy.errors import UsageError
    from cushion_deploy.runtime.hub import hub_errors

    with pytest.raises(UsageError, match="'a/b' is not a name that the hub allows: no"), hub_errors("a/b"):
        raise HFValidationError("no")


def test_a_cache_that_cannot_be_written_is_named(pushed: Any, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("verify", NAME, HF_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 2, done.stderr
    assert f"cannot use {tmp_path / 'file'}" in done.stderr


def pickled(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return a bundle whose manifest, digest included, lists a pickle."""
    return {**listing(files, "evil.bin"), "evil.bin": b"\x80\x04."}


def listing(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return a bundle whose manifest, digest included, lists one more file."""
    from cushion_deploy.store import BundleManifest, FileEntry

    manifest = BundleManifest.from_json(json.loads(files["cushion.json"]))
    listed = {**manifest.files, name: FileEntry("0" * 64, 3)}
    return {**files, "cushion.json": BundleManifest(listed, manifest.recipe, manifest.parents).to_bytes()}
