"""Report the progress bars of transformers through the project's own progress callback instead of on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

from cushion_deploy.core.progress import Progress

TASKS = {
    "Converting and de-quantizing": "converting GGUF tensors",
    "Loading weights": "loading weights",
    "Writing model shards": "writing the model",
}
"""Beginning of a bar's description in transformers, and the task that it is reported as; other bars are dropped."""


class _Bar:
    """A stand-in for a tqdm bar that reports its count."""

    def __init__(self, progress: Progress, items: Any = None, **options: Any) -> None:
        description = str(options.get("desc") or "")
        self._task = next((task for start, task in TASKS.items() if description.startswith(start)), None)
        total = options.get("total")
        self._total = int(total) if total is not None else len(items) if isinstance(items, Sized) else 0
        self._progress, self._items, self._done = progress, items, 0
        self._report()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: float | None = 1) -> None:
        """Advance by ``count`` units."""
        self._done += int(count or 0)
        self._report()

    def _report(self) -> None:
        if self._task and self._total:
            self._progress(self._task, min(self._done, self._total), self._total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        """Return a function that does nothing, for tqdm methods that only change how a bar looks."""
        return lambda *_, **__: None


@contextmanager
def reported_bars(progress: Progress) -> Iterator[None]:
    """Report transformers' bars to ``progress`` within the context; none of them is written to stderr."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    def bar(items: Any = None, *_: Any, **options: Any) -> _Bar:
        return _Bar(progress, items, **options)

    # The GGUF reader takes tqdm directly; everything else goes through the hook.
    previous = logging.set_tqdm_hook(lambda _, args, options: bar(*args, **options))
    direct, gguf.tqdm = gguf.tqdm, bar
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
        gguf.tqdm = direct
