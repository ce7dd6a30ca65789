"""Errors in the form of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cushion_deploy.errors import CushionError, MissingDependency, UsageError
from cushion_deploy.serve.request import Delivery
from cushion_deploy.serve.scheduler import Refused

RETRY_SECONDS = 1
_TYPE_NAME = re.compile(r"[A-Z]|(str|int|float|literal|list)(\[|$)")
"""What pydantic puts into the place of an error to say which type of a union it means."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what is wrong and what to do.
        param: the field of the request that is wrong.
        code: short name of the error.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value of the answer."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, self.headers)


def unsupported(param: str, message: str) -> ApiError:
    """Return the error for a feature of the API that this server does not have."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def from_cushion_error(error: CushionError, param: str | None = None) -> ApiError:
    """Return the answer for an expected error: 400 for bad input, 429 for a full queue, 503 or 500 for the server's."""
    message = f"{error.message}; {error.hint}"
    if isinstance(error, Refused):
        if error.retry:
            return ApiError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
        return ApiError(503, message, code="shutting_down")
    if isinstance(error, MissingDependency):
        return ApiError(501, message, param=param, code="missing_dependency")
    if isinstance(error, UsageError):
        return ApiError(400, message, param=param)
    return ApiError(500, message, code="engine_error")


def from_delivery(delivery: Delivery) -> ApiError | None:
    """Return the error of a sequence that was cut off; None if it ended by itself."""
    if delivery.end == "timeout":
        # Clients retry on a 504 by themselves; the same request would take as long again.
        message = "the request took longer than the server allows; ask for fewer tokens"
        return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})
    if delivery.end == "shutdown":
        return ApiError(503, "the server shut down before the answer was complete", code="shutting_down")
    if delivery.error is not None:
        return from_cushion_error(delivery.error)
    return None


def install(app: FastAPI) -> None:
    """Make every error of the app an answer in the form of the API."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(CushionError)
    async def _expected(request: Request, error: CushionError) -> JSONResponse:
        return from_cushion_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; see its log", code="internal_error").response()


def _from_validation(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body" and not _TYPE_NAME.match(str(part))]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return unsupported(param or "", f"unknown or unsupported parameter: '{param}'")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "value_error":
        return ApiError(400, str(first["ctx"]["error"]), param=param, code="invalid_value")
    if param is None:
        return ApiError(400, "the body must be a JSON object, with the header Content-Type: application/json")
    message = str(first["msg"])
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"'{param}': {message}", param=param, code=code)
