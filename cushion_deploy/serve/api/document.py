"""What ``/openapi.json`` says beyond the bodies of requests: forms of answers and errors, and the name of the model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What is wrong; ``param`` is the field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status from 400 on."""

    error: ErrorDetail


_REFUSED: dict[str, Any] = {"model": ErrorBody, "description": "The request is refused, or its client is gone."}
_FAILED: dict[str, Any] = {"model": ErrorBody, "description": "The server shuts down, took too long, or failed."}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _REFUSED, "5XX": _FAILED}
"""Answers of every route of the API. FastAPI would document a status 422 that is never sent."""
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "The answer, or its events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {"4XX": _REFUSED, 503: {"description": "Not now."}}


def name_model(app: FastAPI, name: str) -> None:
    """Make ``/openapi.json`` say that ``model`` in a body is this name."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("required", ()):
                schema["properties"]["model"]["enum"] = [name]
        return document

    app.openapi = described  # type: ignore[method-assign]
