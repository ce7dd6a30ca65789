"""The application: routes of the OpenAI API, health, metrics and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from cushion_deploy.serve.api import errors
from cushion_deploy.serve.api.answer import Answer
from cushion_deploy.serve.api.chat import ChatForm, chat_sequences
from cushion_deploy.serve.api.chat_models import ChatRequest
from cushion_deploy.serve.api.completions import CompletionForm, CompletionRequest, completion_sequences
from cushion_deploy.serve.api.document import ERRORS, STREAMED, UNAVAILABLE, name_model
from cushion_deploy.serve.api.guard import RequestGuard
from cushion_deploy.serve.api.parameters import require_model
from cushion_deploy.serve.api.stream import EventStream
from cushion_deploy.serve.api.token_text import TokenText
from cushion_deploy.serve.constraints import Grammars
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.metrics import Metrics
from cushion_deploy.serve.page import FILES, read_file
from cushion_deploy.serve.proof import bundle_proof
from cushion_deploy.store.manifest import tool_version

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class AppSettings:
    """Settings of the HTTP side.

    Attributes:
        hosts: names that a Host header may have; empty for any.
        api_key: key that requests must carry; None for none.
        cors_origins: origins whose pages may call the API.
        max_body: most bytes of a body.
        body_seconds: most seconds until a body is complete.
        request_seconds: most seconds until an answer is complete; None for no limit.
    """

    hosts: Sequence[str] = ()
    api_key: str | None = None
    cors_origins: Sequence[str] = ()
    max_body: int = 4 << 20
    body_seconds: float = 30.0
    request_seconds: float | None = 600.0


def create_app(engine: Engine, metrics: Metrics, settings: AppSettings | None = None) -> FastAPI:
    """Return the application; the engine is started with it and stopped after it."""
    settings = settings or AppSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    # The pages of the API documentation load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="cushion-deploy", version=tool_version(), docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    _add_api(app, engine, settings.request_seconds)
    _add_operations(app, engine, metrics)
    _add_page(app, engine)
    name_model(app, engine.name)
    app.add_middleware(
        RequestGuard,
        hosts=settings.hosts,
        api_key=settings.api_key,
        public=[path for path, _ in FILES.values()],
        max_body=settings.max_body,
        body_seconds=settings.body_seconds,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_api(app: FastAPI, engine: Engine, timeout: float | None) -> None:
    tokens = TokenText(engine.bundle.tokenizer)
    grammars = Grammars(engine.bundle.tokenizer, engine.vocab_size, engine.bundle.eos_token_ids)

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        requests = await run_in_threadpool(completion_sequences, engine, body, timeout)
        return await _answer(Answer(engine, requests), CompletionForm(engine, body, tokens), body.stream, request)

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        requests = await run_in_threadpool(chat_sequences, engine, grammars, body, timeout)
        return await _answer(Answer(engine, requests), ChatForm(engine, body, tokens), body.stream, request)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [_model(engine)]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        require_model(engine, name)
        return _model(engine)


async def _answer(answer: Answer, form: CompletionForm | ChatForm, streamed: bool | None, request: Request) -> Response:
    if streamed:
        return EventStream(form.chunks(answer), answer.cancel)
    await answer.collect(partial(_disconnected, request.receive))
    return JSONResponse(form.whole(answer))


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _model(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "cushion-deploy",
        "max_model_len": engine.context_limit,
    }


def _add_operations(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    metrics.watch(engine)

    @app.get("/health", responses=UNAVAILABLE)
    async def health() -> JSONResponse:
        """Say whether the engine runs."""
        return JSONResponse({"status": "ok" if engine.alive else "stopped"}, 200 if engine.alive else 503)

    @app.get("/ready", responses=UNAVAILABLE)
    async def ready() -> JSONResponse:
        """Say whether new requests are taken."""
        return JSONResponse({"ready": engine.ready}, 200 if engine.ready else 503)

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Return the metrics."""
        return Response(metrics.text(), media_type=METRICS_TYPE)


def _add_page(app: FastAPI, engine: Engine) -> None:
    proof = bundle_proof(engine.bundle, engine.engine)

    @app.get("/proof", responses=ERRORS)
    async def show_proof() -> dict[str, Any]:
        """Return what the bundle says about itself."""
        chats = engine.bundle.chat_template is not None
        return {"model": engine.name, "context": engine.context_limit, "chat": chats, **proof}

    for name, (path, kind) in FILES.items():
        app.add_api_route(path, partial(_file, read_file(name), kind), include_in_schema=False, response_model=None)


async def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
