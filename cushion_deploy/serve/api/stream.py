"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from cushion_deploy.serve.api.errors import ApiError

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> str:
    """Return one event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Return an answer that sends each chunk as an event, then ``[DONE]``.

    The status is sent before the first chunk, so an error after it is an event, as the API has it, and ends the stream.
    """
    return StreamingResponse(_events(chunks), media_type="text/event-stream", headers=HEADERS)


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield event(chunk)
    except ApiError as e:
        yield event(e.body)
        return
    yield "data: [DONE]\n\n"
