"""`serve`: an OpenAI-compatible server for a bundle."""

from __future__ import annotations

import os
from math import isfinite
from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import RequiredSignature, bundle_argument, open_named, signature_options
from cushion_deploy.cli.help import FILE, option, verb
from cushion_deploy.cli.session_options import engine_option, threads_option
from cushion_deploy.cli.terminal import echo_remarks
from cushion_deploy.core.progress import elapsed
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.store.text_files import read_utf8

KEY_VARIABLE = "CUSHION_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@verb(
    "serve",
    "serve OUT",
    "serve OUT --host 0.0.0.0 --api-key-file key.txt --tls-cert cert.pem --tls-key key.pem",
)
@bundle_argument
@option("--host", heading="Network", metavar="ADDRESS", default="127.0.0.1", help="Address to listen on.")
@option("--port", heading="Network", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one.")
@engine_option
@threads_option
@option(
    "--model-name",
    heading="Network",
    metavar="NAME",
    fallback="the name of the folder",
    help="Name of the model in the API.",
)
@option(
    "--api-key-file",
    heading="Security",
    type=FILE,
    metavar="FILE",
    fallback=f"the variable {KEY_VARIABLE}, or no key",
    help="File with the key that requests must carry.",
)
@option(
    "--allow-anonymous", heading="Security", is_flag=True, help="Allow other machines to send requests without a key."
)
@option(
    "--allowed-host",
    heading="Security",
    multiple=True,
    metavar="NAME",
    help="Host name that requests may be addressed to. Repeatable.",
)
@option(
    "--cors-origin",
    heading="Security",
    multiple=True,
    metavar="ORIGIN",
    fallback="none",
    help="Origin whose web pages may call the API, such as https://example.com. Repeatable.",
)
@option(
    "--tls-cert",
    heading="Security",
    type=FILE,
    metavar="FILE",
    help="Certificate with its chain (PEM), to serve HTTPS. Requires --tls-key.",
)
@option("--tls-key", heading="Security", type=FILE, metavar="FILE", help="Key of --tls-cert (PEM), without a password.")
@option("--max-rows", heading="Limits", type=click.IntRange(1), default=8, help="Sequences in one batch.")
@option("--queue", heading="Limits", type=click.IntRange(1), default=64, help="Sequences that wait; more are refused.")
@option(
    "--prefill-chunk",
    heading="Limits",
    type=click.IntRange(1),
    default=128,
    help="Tokens of a long prompt that are computed between two steps of the other sequences.",
)
@option(
    "--kv-pool-mib",
    heading="Limits",
    type=click.IntRange(0),
    default=512,
    help="Memory for the keys and values of earlier prompts, in MiB; 0 keeps none.",
)
@option(
    "--request-timeout",
    heading="Limits",
    type=click.FloatRange(min=1),
    default=600,
    metavar="SECONDS",
    help="Time after which an answer is ended.",
)
@option(
    "--max-body-kib", heading="Limits", type=click.IntRange(1), default=4096, help="Size of a request's body, in KiB."
)
@option(
    "--drain-timeout",
    heading="Limits",
    type=click.FloatRange(min=0),
    default=20,
    metavar="SECONDS",
    help="Time that answers under way have to end after SIGTERM or Ctrl-C.",
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
    """Serve BUNDLE through an OpenAI-compatible API, with a chat page at `/`.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. The server listens on this machine
    only, unless --host says otherwise. Ctrl-C ends it after the answers that are under way.
    """
    require_modules("fastapi", "uvicorn", "prometheus_client", "llguidance")
    if not isfinite(request_timeout) or not isfinite(drain_timeout):
        raise UsageError("--request-timeout and --drain-timeout are numbers of seconds", hint="86400 is a day")
    key = _api_key(api_key_file)
    local = host in LOOPBACK
    if key is None and not local and not allow_anonymous:
        raise UsageError(
            f"{host} can be reached from other machines, and there is no API key",
            hint=f"set {KEY_VARIABLE} or give --api-key-file; --allow-anonymous serves everyone",
        )
    from cushion_deploy.cli.progress import progress
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
        with progress(at_once=True) as report:
            opened, metrics = open_named(bundle, required, report), Metrics()
            with elapsed(report, f"loading {engine}"):
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
