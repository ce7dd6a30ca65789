"""The sequences of one request in an event loop: their deliveries as they come, and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from cushion_deploy.serve.api.errors import ApiError, from_delivery
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.request import Delivery, SequenceRequest, SequenceUsage, TokenLogprob


@dataclass
class Choice:
    """A finished sequence: its text, its tokens and how it ended."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    end: str = ""
    usage: SequenceUsage = field(default_factory=lambda: SequenceUsage(0, 0, 0))

    def add(self, delivery: Delivery) -> None:
        """Append what was delivered."""
        self.text += delivery.text
        if delivery.token is not None:
            self.tokens.append(delivery.token)
        if delivery.end is not None:
            self.end = delivery.end
        if delivery.usage is not None:
            self.usage = delivery.usage


class Answer:
    """Submits the sequences of a request at once.

    Args:
        engine: the engine.
        requests: one for each choice of each prompt, in the order of the choices.

    Raises:
        Refused: the queue is full, or the server shuts down.
    """

    def __init__(self, engine: Engine, requests: list[SequenceRequest]) -> None:
        """Queue the sequences; call it in the event loop that iterates."""
        self.choices = [Choice() for _ in requests]
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        self._jobs = engine.submit(requests, self._deliver)

    def _deliver(self, index: int, delivery: Delivery) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delivery))
        except RuntimeError:
            # The loop is closed: nobody waits for this any more.
            self.cancel()

    async def deliveries(self) -> AsyncIterator[tuple[int, Delivery]]:
        """Yield the choice and what it delivers, until all have ended; leaving the loop early cancels them.

        Raises:
            ApiError: a sequence was cut off; the others are cancelled.
        """
        left = len(self.choices)
        try:
            while left:
                index, delivery = await self._queue.get()
                error = from_delivery(delivery)
                if error is not None:
                    raise error
                self.choices[index].add(delivery)
                left -= delivery.end is not None
                yield index, delivery
        finally:
            self.cancel()

    async def collect(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Wait until all sequences have ended, or cancel them when ``gone`` returns.

        Raises:
            ApiError: a sequence was cut off, or the client went away (499, which nobody reads).
        """
        watching = asyncio.ensure_future(gone())
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({watching, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ApiError(499, "the client closed the connection", code="client_closed_request")
            reading.result()
        finally:
            self.cancel()
            watching.cancel()
            reading.cancel()

    async def _read(self) -> None:
        async for _ in self.deliveries():
            pass

    def cancel(self) -> None:
        """Stop generating; sequences that have ended are not affected."""
        for job in getattr(self, "_jobs", ()):
            job.cancel()

    def usage(self, choices_per_prompt: int) -> dict[str, object]:
        """Return the usage of the request: each prompt counts once, however many choices it has."""
        firsts = [choice.usage for choice in self.choices[::choices_per_prompt]]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        new = sum(choice.usage.new_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
        }
