"""What every request passes before its route: host, key, size and time of its body; headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cushion_deploy.serve.api.errors import ApiError

OPEN_PATHS = ("/health", "/ready")
"""What needs no key, beside the files of the page."""
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def host_name(value: str) -> str:
    """Return the name in a Host header, without its port and in lower case."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.rpartition(":")[0] if value.count(":") == 1 else value


class RequestGuard:
    """ASGI middleware.

    Args:
        app: the application.
        hosts: names that a Host header may have; empty for any. Without this check a web page of someone else could
            reach a server on this machine through a name that it lets point here (DNS rebinding).
        api_key: key that requests must carry as a bearer token; None for no key.
        public: further paths that need no key.
        max_body: most bytes of a body.
        body_seconds: most seconds until a body is complete.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Sequence[str] = (),
        api_key: str | None = None,
        public: Sequence[str] = (),
        max_body: int = 4 << 20,
        body_seconds: float = 30.0,
    ) -> None:
        self._app, self._hosts = app, frozenset(host.lower() for host in hosts)
        self._key = None if api_key is None else api_key.encode()
        self._public = {*OPEN_PATHS, *public}
        self._max_body, self._body_seconds = max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            receive = await self._with_body(scope, receive)
        except ApiError as e:
            await e.response()(scope, receive, send_secured)
            return
        await self._app(scope, receive, send_secured)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts and host_name(headers.get("host", "")) not in self._hosts:
            message = "this host name is not allowed; start the server with --allowed-host NAME"
            raise ApiError(421, message, code="host_not_allowed")
        if self._key is None or scope["path"] in self._public:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body; the messages that follow it, such as the end of the connection, come as before."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body:
            raise self._too_large()
        if not length and "transfer-encoding" not in headers:
            return receive
        body = await self._read(receive)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message: dict[str, Any] = dict(await receive())
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client closed the connection")
                body.extend(message.get("body", b""))
                if len(body) > self._max_body:
                    raise self._too_large()
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self._body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(408, f"the body did not arrive within {self._body_seconds:g} seconds") from None
        return bytes(body)

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection cannot be used again.
        return ApiError(
            413, f"the body is larger than {self._max_body:,} bytes", code="too_large", headers={"Connection": "close"}
        )
