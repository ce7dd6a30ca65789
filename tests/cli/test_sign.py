"""Signatures with key pairs: keys from OpenSSL, and model-signing's own command line as the second opinion."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.store import publish, staging_area

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("model_signing", reason="model-signing is not installed")
OPENSSL = shutil.which("openssl")
if OPENSSL is None:
    pytest.skip("openssl is not installed", allow_module_level=True)

FILES = {"model.onnx": b"graph", "model.onnx.data": bytes(range(256)), "engines/cpu/engine.json": b"{}"}


def openssl(*arguments: object, text: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *map(str, arguments)], input=text, capture_output=True, check=True)
    return done.stdout


def make_keys(folder: Path, *generate: object) -> tuple[Path, Path]:
    """Write a key pair with OpenSSL; return the private and the public file."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "private.pem", folder / "public.pem"
    openssl("genpkey", *generate, "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public


def curve(name: str) -> tuple[str, ...]:
    return ("-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{name}")


def write_bundle(out: Path, files: dict[str, bytes]) -> Path:
    with staging_area(out) as staged:
        for name, content in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(content)
        publish(staged, out, {"seed": 3}, {"model": "ab" * 32})
    return out


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"), *curve("P-256"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {**FILES, "README.md": b"a card"})


@pytest.fixture
def signed(bundle: Path, keys: Any, cli: Any) -> Path:
    done = cli("sign", bundle, "--key", keys[0])
    assert done.code == 0, done.err
    return bundle


def model_signing(bundle: Path, signature: Path, public: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Verify with the command line of model-signing, which hashes the files itself."""
    options = ["verify", "key", bundle, "--signature", signature, "--public_key", public, *more]
    command = [sys.executable, "-m", "model_signing", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_signed_bundle_verifies_here_and_with_model_signing_itself(signed: Path, keys: Any, cli: Any) -> None:
    for options in (("--signature", "--public-key", keys[1]), ("--public-key", keys[1])):
        done = cli("verify", signed, *options)
        assert done.code == 0, done.err
        assert f"signed with the private key of {keys[1]}: 4 files" in done.out
    assert "model.sig (added)" in cli("verify", signed).out
    other = model_signing(signed, signed / "model.sig", keys[1])
    assert other.returncode == 0, other.stderr
    (signed / "model.onnx").write_bytes(b"grapH")
    assert model_signing(signed, signed / "model.sig", keys[1]).returncode == 1


def test_openssl_agrees_on_what_was_signed(signed: Path, keys: Any, tmp_path: Path) -> None:
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    # The pre-authentication encoding of DSSE 1.0.
    (tmp_path / "signed").write_bytes(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    verify = ("dgst", "-sha256", "-verify", keys[1], "-signature", tmp_path / "signature", tmp_path / "signed")
    assert b"Verified OK" in openssl(*verify)
    resources = json.loads(payload)["predicate"]["resources"]
    found = {row["name"]: row["digest"] for row in resources}
    names = [*FILES, "cushion.json"]
    assert found == {n: openssl("dgst", "-sha256", "-r", signed / n).decode().split()[0] for n in names}


@pytest.mark.parametrize("name", ["P-384", "P-521"])
def test_other_curves(bundle: Path, cli: Any, tmp_path: Path, name: str) -> None:
    private, public = make_keys(tmp_path / "keys", *curve(name))
    assert cli("sign", bundle, "--key", private, "--output", tmp_path / "out.sig").code == 0
    done = cli("verify", bundle, "--signature", tmp_path / "out.sig", "--public-key", public)
    assert done.code == 0, done.err
    assert not (bundle / "model.sig").exists()


def test_a_document_may_be_edited_after_it_was_signed(signed: Path, keys: Any, cli: Any) -> None:
    (signed / "README.md").write_text("a better card")
    (signed / "LICENSE").write_text("ours")
    assert cli("verify", signed, "--public-key", keys[1]).code == 0
    other = model_signing(signed, signed / "model.sig", keys[1])
    assert other.returncode == 0, other.stderr


def test_a_snapshot_of_the_hub_verifies(signed: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    folder = repository / "snapshots" / ("ab" * 20)
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in signed.rglob("*") if p.is_file())):
        link = folder / file.relative_to(signed)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(repository / "blobs" / str(number))
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    done = cli("verify", folder, "--public-key", keys[1])
    assert done.code == 0, done.err
    other = model_signing(folder, folder / "model.sig", keys[1], "--allow_symlinks")
    assert other.returncode == 0, other.stderr


def refused(done: Any, code: int, *words: str) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("  -> ")
    for word in words:
        assert word in done.err


DAMAGE: dict[str, Callable[[Path], object]] = {
    "'model.onnx' in": lambda b: (b / "model.onnx").write_bytes(b"grapH"),
    "is missing": lambda b: (b / "model.onnx.data").unlink(),
    "is not listed": lambda b: (b / "extra.json").write_bytes(b"{}"),
    "was altered after it was written": lambda b: (b / "cushion.json").write_bytes(
        (b / "cushion.json").read_bytes().replace(b'"seed": 3', b'"seed": 4')
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_bundle_is_refused_signed_or_not(signed: Path, keys: Any, cli: Any, words: str) -> None:
    DAMAGE[words](signed)
    refused(cli("verify", signed, "--public-key", keys[1]), 4, words)
    before = (signed / "model.sig").read_bytes()
    refused(cli("sign", signed, "--key", keys[0]), 4, words)
    assert (signed / "model.sig").read_bytes() == before


def test_the_bundle_of_a_forger_is_refused(signed: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    # Valid in itself: what a manifest without a signature cannot detect.
    forged = write_bundle(tmp_path / "forged", {**FILES, "model.onnx": b"evil!"})
    shutil.copy(signed / "model.sig", forged)
    assert cli("verify", forged).code == 0
    refused(
        cli("verify", forged, "--public-key", keys[1]), 4, "is of other files", "changed: cushion.json, model.onnx)"
    )
    fewer = write_bundle(tmp_path / "fewer", {"model.onnx": b"graph"})
    shutil.copy(signed / "model.sig", fewer)
    refused(
        cli("verify", fewer, "--public-key", keys[1]),
        4,
        "is of other files",
        "signed and missing: engines/cpu/engine.json, model.onnx.data",
    )


def test_a_signature_that_leaves_out_a_file_is_refused(bundle: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    sign = ["sign", "key", bundle, "--private_key", keys[0], "--signature", tmp_path / "s", "--ignore-paths"]
    command = [sys.executable, "-m", "model_signing", *map(str, [*sign, bundle / "model.onnx"])]
    subprocess.run(command, check=True, capture_output=True)
    (bundle / "model.onnx").write_bytes(b"evil!")
    assert model_signing(bundle, tmp_path / "s", keys[1]).returncode == 0, "model-signing obeys it"
    shutil.rmtree(bundle)
    write_bundle(bundle, {**FILES, "model.onnx": b"evil!"})
    options = ("--signature", tmp_path / "s", "--public-key", keys[1])
    refused(cli("verify", bundle, *options), 4, "is of other files", "not signed: model.onnx")


def test_another_key_is_refused_whatever_the_signature_says(signed: Path, cli: Any, tmp_path: Path) -> None:
    _, public = make_keys(tmp_path / "keys", *curve("P-256"))
    refused(cli("verify", signed, "--public-key", public), 4, "made with another key")
    content = json.loads((signed / "model.sig").read_text())
    del content["verificationMaterial"]["publicKey"]["hint"]
    (signed / "model.sig").write_text(json.dumps(content))
    refused(cli("verify", signed, "--public-key", public), 4, "was not made with the private key")


def test_every_field_of_the_signature_counts(signed: Path, keys: Any, cli: Any) -> None:
    content = (signed / "model.sig").read_text()
    parsed = json.loads(content)
    payload = base64.b64decode(parsed["dsseEnvelope"]["payload"])
    altered = base64.b64encode(payload.replace(b"model.onnx.data", b"model.onnx.datA")).decode()
    variants = [
        *("", "{}", "[]", "null", "[" * 100_000, "\x00", content[: len(content) // 2]),
        content.replace(parsed["dsseEnvelope"]["payload"], altered),
        content.replace(parsed["dsseEnvelope"]["payload"], "AAAA"),
        content.replace(parsed["dsseEnvelope"]["signatures"][0]["sig"], "AAAA"),
        json.dumps({**parsed, "dsseEnvelope": {**parsed["dsseEnvelope"], "signatures": []}}),
        json.dumps({**parsed, "mediaType": "text/plain"}),
    ]
    for variant in variants:
        (signed / "model.sig").write_text(variant)
        refused(cli("verify", signed, "--public-key", keys[1]), 4, "model.sig")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "it is empty"), (b"\n", "it is empty"), (b"MEUC", "it is not JSON"), (b"[]", "its mediaType is None")],
)
def test_a_file_that_is_no_signature_is_told_from_one_that_does_not_hold(
    signed: Path, keys: Any, cli: Any, content: bytes, words: str
) -> None:
    (signed / "model.sig").write_bytes(content)
    done = cli("verify", signed, "--public-key", keys[1])
    refused(done, 4, f"model.sig is not a signature: {words}", "`cushion-deploy sign`")


def test_a_missing_signature_is_no_success(bundle: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    refused(cli("verify", bundle, "--public-key", keys[1]), 4, "is not signed")
    options = ("--signature", tmp_path / "gone", "--public-key", keys[1])
    refused(cli("verify", bundle, *options), 2, "gone", "does not exist")
    refused(cli("verify", bundle, "--signature"), 2, "--public-key")
    os.mkfifo(tmp_path / "pipe")
    options = ("--signature", tmp_path / "pipe", "--public-key", keys[1])
    refused(cli("verify", bundle, *options), 2, "not a plain file")


def test_an_encrypted_key_needs_its_password(
    bundle: Path, keys: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, password = tmp_path / "encrypted.pem", tmp_path / "password"
    openssl("pkey", "-in", keys[0], "-aes256", "-passout", "pass:correct horse", "-out", private)
    refused(cli("sign", bundle, "--key", private), 2, "is encrypted", "--key-password-file")
    password.write_text("wrong\n")
    refused(cli("sign", bundle, "--key", private, "--key-password-file", password), 2, "the password is wrong", "pkey")
    password.write_text("\n")
    refused(cli("sign", bundle, "--key", private, "--key-password-file", password), 2, "the password that was given is")
    refused(cli("sign", bundle, "--key", keys[0], "--key-password-file", password), 2, "is not encrypted")
    refused(cli("sign", bundle, "--key", private, "--key-password-file", tmp_path / "gone"), 2, "gone")
    assert not (bundle / "model.sig").exists()
    password.write_text("correct horse\n")
    assert cli("sign", bundle, "--key", private, "--key-password-file", password).code == 0
    (bundle / "model.sig").unlink()
    monkeypatch.setenv("CUSHION_KEY_PASSWORD", "correct horse")
    assert cli("sign", bundle, "--key", private).code == 0
    assert cli("verify", bundle, "--public-key", keys[1]).code == 0


def test_keys_of_another_kind_are_named(signed: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    kinds = {
        "not of an elliptic curve": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
        "expected P-256, P-384, P-521": ("-algorithm", "ED25519"),
        "of the curve secp256k1": curve("secp256k1"),
    }
    for number, (words, generate) in enumerate(kinds.items()):
        private, public = make_keys(tmp_path / str(number), *generate)
        refused(cli("sign", signed, "--key", private), 2, words, str(private))
        refused(cli("verify", signed, "--public-key", public), 2, words, str(public))
    refused(cli("sign", signed, "--key", keys[1]), 2, "no private key", "openssl")
    refused(cli("verify", signed, "--public-key", keys[0]), 2, "it has a private key", "openssl")
    (tmp_path / "broken.pem").write_bytes(keys[0].read_bytes().replace(b"M", b"N"))
    refused(cli("sign", signed, "--key", tmp_path / "broken.pem"), 2, "cannot read the private key")
    refused(cli("sign", signed, "--key", tmp_path / "gone.pem"), 2, "does not exist")
    refused(cli("verify", signed, "--public-key", tmp_path), 2, "not a plain file")


def test_a_signature_overwrites_nothing_but_a_signature(signed: Path, keys: Any, cli: Any, tmp_path: Path) -> None:
    before = (signed / "model.sig").read_bytes()
    assert cli("sign", signed, "--key", keys[0]).code == 0
    # ECDSA draws a random number, so a second signature differs.
    assert (signed / "model.sig").read_bytes() != before
    for name in ("model.onnx", "other.sig", "engines/model.sig"):
        refused(cli("sign", signed, "--key", keys[0], "-o", signed / name), 2, "only model.sig may be added")
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(cli("sign", signed, "--key", keys[0], "-o", tmp_path / "thesis.txt"), 2, "is not a signature")
    refused(cli("sign", signed, "--key", keys[0], "-o", tmp_path / "no" / "s"), 2, "does not exist")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert cli("verify", signed, "--public-key", keys[1]).code == 0


def test_without_the_library_the_extra_is_named(signed: Path, keys: Any, python: Any) -> None:
    code = "import sys; sys.modules['model_signing'] = None; from cushion_deploy.cli.main import main; main()"
    for arguments in (("sign", signed, "--key", keys[0]), ("verify", signed, "--public-key", keys[1])):
        done = python(code, *arguments)
        assert done.returncode == 3
        assert "pip install 'cushion-deploy[sign]'" in done.stderr
    assert python(code, "verify", signed).returncode == 0


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_what_runs_a_bundle_can_demand_a_signature(
    copy: Path, keys: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    monkeypatch.setattr("cushion_deploy.serve.server.run", lambda server, listener: None)
    command: tuple[object, ...] = {
        "generate": ("generate", copy, "A head", "--max-new-tokens", 2),
        "chat": ("chat", copy, "--max-new-tokens", 2),
        "serve": ("serve", copy, "--port", 0),
    }[verb]
    opened: list[object] = []
    original = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **m: opened.append(a) or original(*a, **m))
    _, other = make_keys(tmp_path / "other", *curve("P-256"))
    refused(cli(*command, "--public-key", keys[1]), 4, "is not signed")
    assert cli("sign", copy, "--key", keys[0], "--output", tmp_path / "s").code == 0
    refused(cli(*command, "--public-key", other, "--signature", tmp_path / "s"), 4, "another key")
    refused(cli(*command, "--public-key", keys[0]), 2, "it has a private key")
    refused(cli(*command, "--signature", tmp_path / "s"), 2, "--public-key")
    # Valid in itself, with a tokenizer that cannot be read: nothing is read before the signature.
    forged = write_bundle(tmp_path / "forged", {"tokenizer.json": b"evil", "config.json": b"evil"})
    on_forged = [forged if part is copy else part for part in command]
    refused(cli(*on_forged, "--public-key", keys[1], "--signature", tmp_path / "s"), 4, "is of other files")
    assert not opened
    done = cli(*command, "--public-key", keys[1], "--signature", tmp_path / "s")
    assert done.code == 0, done.err
    assert opened
