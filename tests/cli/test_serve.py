"""`serve` as a process: it says where it listens, answers, and ends on SIGTERM."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from cushion_deploy.store.files import human_bytes

DRIVER = """
import sys
from cushion_deploy.cli.main import main
import atexit
heavy = {"torch", "transformers", "onnx", "onnx_ir", "matplotlib"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
main(["serve", *sys.argv[1:]])
"""


@pytest.fixture
def process(start: Any, planted_bundle: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a server and returns its process and its address."""
    started = []

    def serve(*options: str) -> Any:
        child = start(DRIVER, planted_bundle.bundle, "--port", "0", *options)
        started.append(child)
        line = child.stdout.readline()
        found = re.search(r"https?://127\.0\.0\.1:\d+", line)
        assert found, line + child.stderr.read()
        return child, found[0], line

    yield serve
    for child in started:
        child.kill()
        child.communicate()


def test_it_answers_and_ends_on_sigterm_without_torch(process: Any, cli: Any, planted_bundle: Any) -> None:
    child, url, line = process("--threads", "1", "--drain-timeout", "30")
    assert "serving bundle on" in line
    assert "in one batch" in line
    expected = cli("generate", planted_bundle.bundle, "A head", "--max-new-tokens", 8, "--json").json
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        got = client.completions.create(model="bundle", prompt="A head", max_tokens=8, temperature=0)
        assert got.choices[0].text == expected["text"]
        stream = iter(client.completions.create(model="bundle", prompt="A", max_tokens=64, stream=True))
        next(stream)
        child.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] in ("length", "stop")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "stopped\n")
    *said, modules = err.splitlines()
    assert modules == "[]"
    # What takes long on a slow machine is named when it begins; a line with the seconds may follow.
    begun = [line for line in said if not re.search(r": \d+ s$", line)]
    size = human_bytes(sum(file.stat().st_size for file in planted_bundle.bundle.rglob("*") if file.is_file()))
    assert begun == [f"verifying {planted_bundle.bundle}, {size}", "loading onnxruntime"]


def test_a_key_comes_from_a_file(process: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    _, url, _ = process("--api-key-file", str(tmp_path / "key"), "--model-name", "m")
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    found = httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).json()
    assert found["data"][0]["id"] == "m"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--host", "192.0.2.1", "--allow-anonymous"], "cannot listen"),
        (["--api-key-file", "missing"], "cannot read"),
        (["--engine", "tensorrt-rtx", "--port", "0"], "not built for"),
        (["--max-rows", "0"], "max-rows"),
    ],
)
def test_bad_options_are_refused_in_words(cli: Any, planted_bundle: Any, options: list[str], words: str) -> None:
    done = cli("serve", planted_bundle.bundle, *options)
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_damaged_bundle_is_not_served(cli: Any, copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert cli("serve", copy, "--port", "0").code == 4


def test_a_bundle_of_the_hub_has_its_name_there(cli: Any, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return Path(planted_bundle.bundle)

    monkeypatch.setattr("cushion_deploy.runtime.hub.fetch_bundle", fetch)
    monkeypatch.setattr("cushion_deploy.serve.server.run", lambda server, listener: None)
    done = cli("serve", "org/name@v1", "--port", "0")
    assert done.code == 0, done.err
    assert done.out.startswith("serving org/name on ")
    assert done.err.splitlines()[0] == "fetching org/name@v1"
    assert asked == [("org/name", "v1")]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a certificate of 127.0.0.1, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command, which makes a certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([openssl, "req", "-x509", *kind, *name, *files], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_a_certificate_makes_it_https_and_connections_are_kept(process: Any, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    _, url, _ = process("--tls-cert", str(cert), "--tls-key", str(key), "--model-name", "m")
    context = ssl.create_default_context(cafile=str(cert))
    address = urlsplit(url)
    assert address.scheme == "https"
    connection = http.client.HTTPSConnection(str(address.hostname), address.port, context=context, timeout=30)
    body = json.dumps({"model": "m", "prompt": "A", "max_tokens": 2})
    for stream in ("false", "true", "false"):
        text = body[:-1] + f', "stream": {stream}}}'
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        sock = connection.sock
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.read()
        assert connection.sock is sock  # http.client drops it where the answer ends the connection
    connection.close()
    with pytest.raises(httpx2.TransportError):
        httpx2.get(url.replace("https", "http") + "/health")


def test_files_that_make_no_tls_are_refused_in_words(
    cli: Any, planted_bundle: Any, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    broken = tmp_path / "key.pem"
    broken.write_text("-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n")
    for options, words in [
        (["--tls-cert", cert], "belong together"),
        (["--tls-cert", cert, "--tls-key", tmp_path / "missing"], "No such file"),
        (["--tls-cert", cert, "--tls-key", broken], "TLS cannot use"),
        (["--tls-cert", key, "--tls-key", key], "TLS cannot use"),
    ]:
        done = cli("serve", planted_bundle.bundle, "--port", "0", *options)
        assert (done.code, words in done.err, "Traceback" in done.err) == (2, True, False), done.err
