"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cushion_deploy.serve.api.errors import ApiError

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> str:
    """Return one event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """An answer that sends each chunk as an event, then ``[DONE]``.

    The status is sent before the first chunk, so an error after it is an event, as the API has it, and ends the stream.

    Args:
        chunks: the chunks.
        ended: is called when the answer was sent or the client has gone, even if no chunk was ever asked for.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], ended: Callable[[], None]) -> None:
        self._ended = ended
        super().__init__(_events(chunks), media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield event(chunk)
            # Chunks that wait already are sent without a pause in which the loop could see that the client has gone.
            await asyncio.sleep(0)
    except ApiError as e:
        yield event(e.body)
        return
    yield "data: [DONE]\n\n"
