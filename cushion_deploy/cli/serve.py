"""`serve`: an OpenAI-compatible server for a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import RequiredSignature, bundle_argument, open_named, signature_options
from cushion_deploy.cli.terminal import echo_remarks
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.store.text_files import read_utf8

KEY_VARIABLE = "CUSHION_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command("serve")
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 for a free one.")
@click.option("--engine", default="onnxruntime", show_default=True, help=f"Engine to run on: {', '.join(ENGINES)}.")
@click.option("--threads", type=int, help="Threads of an engine on the CPU. Default: one per physical core.")
@click.option("--model-name", help="Name of the model for clients. Default: the name of the folder.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File with the key that requests must carry. Default: the variable {KEY_VARIABLE}; without it no key.",
)
@click.option("--allow-anonymous", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--allowed-host", multiple=True, help="Host name that requests may be sent to; repeatable.")
@click.option("--cors-origin", multiple=True, help="Origin whose pages may call the API; repeatable. Default: none.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate (with its chain): serve HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM key of --tls-cert, without a password.")
@click.option("--max-rows", type=click.IntRange(1), default=8, show_default=True, help="Most sequences in one batch.")
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Most sequences that wait.")
@click.option(
    "--prefill-chunk", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens between two steps."
)
@click.option(
    "--kv-pool-mib", type=click.IntRange(0), default=512, show_default=True, help="Memory for keys and values to reuse."
)
@click.option(
    "--request-timeout", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds for an answer."
)
@click.option(
    "--max-body-kib", type=click.IntRange(1), default=4096, show_default=True, help="Largest body of a request."
)
@click.option(
    "--drain-timeout", type=click.FloatRange(min=0), default=20, show_default=True, help="Seconds to end on SIGTERM."
)
@signature_options
def command(
    bundle: Path,
    host: str,
    port: int,
    engine: str,
    threads: int | None,
    model_name: str | None,
    api_key_file: Path | None,
    allow_anonymous: bool,
    allowed_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    max_rows: int,
    queue: int,
    prefill_chunk: int,
    kv_pool_mib: int,
    request_timeout: float,
    max_body_kib: int,
    drain_timeout: float,
    required: RequiredSignature | None,
) -> None:
    """Serve BUNDLE (a folder, or org/name of the hub) through the OpenAI API, with a chat page at `/`."""
    require_modules("fastapi", "uvicorn", "prometheus_client", "llguidance")
    key = _api_key(api_key_file)
    local = host in LOOPBACK
    if key is None and not local and not allow_anonymous:
        raise UsageError(
            f"{host} can be reached from other machines, and there is no API key",
            hint=f"set {KEY_VARIABLE} or give --api-key-file; --allow-anonymous serves everyone",
        )
    from cushion_deploy.runtime.engine import open_engine
    from cushion_deploy.serve.app import AppSettings, create_app
    from cushion_deploy.serve.engine import Engine, EngineSettings
    from cushion_deploy.serve.metrics import Metrics
    from cushion_deploy.serve.scheduler import Limits
    from cushion_deploy.serve.server import Patience, Server, TlsFiles, bind, run, url

    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together", hint="give both, or neither")
    tls = TlsFiles(tls_cert, tls_key) if tls_cert and tls_key else None

    hosts = (*(LOOPBACK if local else ()), *allowed_host)
    http = AppSettings(hosts, key, cors_origin, max_body_kib << 10, request_seconds=request_timeout)
    settings = EngineSettings(max_rows, Limits(queue, prefill_chunk), kv_pool_mib << 20)
    # Before the bundle is read, because a port in use is found at once.
    with bind(host, port) as listener:
        opened, metrics = open_named(bundle, required), Metrics()
        session = open_engine(opened, engine, threads)
        echo_remarks(engine, session)
        worker = Engine(model_name or _name(bundle, opened.path), opened, session, engine, settings, metrics)
        server = Server(create_app(worker, metrics, http), worker, Patience(drain_timeout), tls)
        # Before the line is printed, because whoever waits for it connects at once.
        listener.listen()
        address = url(listener, tls=tls is not None)
        click.echo(f"serving {worker.name} on {address} with {engine}, {_batching(worker.batches, max_rows)}")
        run(server, listener)
    click.echo("stopped")


def _name(bundle: Path, folder: Path) -> str:
    """Return the name of a folder, or ``org/name`` of a bundle of the hub, whose folder is named after a commit."""
    return bundle.resolve().name if folder == bundle else str(bundle).partition("@")[0]


def _batching(batches: bool, rows: int) -> str:
    return f"up to {rows} sequences in one batch" if batches else "one sequence at a time: this engine cannot batch"


def _api_key(file: Path | None) -> str | None:
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        source = f"the variable {KEY_VARIABLE}"
    else:
        key, source = read_utf8(file).strip(), str(file)
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise UsageError(f"the key in {source} is empty or no ASCII text", hint="give a key of one line")
    return key
