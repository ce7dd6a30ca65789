"""One step of a plan as a CUDA graph: recorded once, launched again for every token.

Only a step whose shapes and addresses stay the same can be recorded: a decode step with a static cache. A graph of our
own, not the one that TensorRT-RTX can record by itself (``IRuntimeConfig.cuda_graph_strategy``): standard TensorRT has
none, and what runs here is then the same for both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from cushion_deploy.engines.tensorrt.cuda import Cuda
from cushion_deploy.errors import CheckFailed

logger = logging.getLogger(__name__)


class StepGraph:
    """Records the second step of a kind and launches the recording from then on.

    The first step runs plainly: TensorRT wants to have met the shapes, and kernels are compiled and loaded then, which
    cannot be recorded. A plan that cannot be recorded at all runs plainly, after one warning.
    """

    def __init__(self, cuda: Cuda) -> None:
        """Begin without a recording."""
        self._cuda = cuda
        self._kind: Hashable = None
        self._recorded: Any = None
        self._usable = True

    def has_met(self, kind: Hashable) -> bool:
        """Return whether a step of a kind ran last: its shapes and addresses are bound then, and stay so."""
        return kind == self._kind

    def launch(self, kind: Hashable) -> bool:
        """Queue the recorded step of a kind; False, and nothing is queued, where there is none.

        Inputs must lie at the addresses that were bound when it was recorded.
        """
        if self._recorded is None or kind != self._kind:
            return False
        self._cuda.launch(self._recorded)
        return True

    def run(self, kind: Hashable, context: Any, enqueue: Callable[[], None]) -> None:
        """Queue a step that is not recorded yet: plainly where it is the first of its kind, else by recording it.

        Args:
            kind: all that the shapes of the step depend on; a recording of another kind is dropped.
            context: execution context with every input bound.
            enqueue: queues the step on the stream; raises CheckFailed where that is refused.
        """
        if kind != self._kind:
            self.close()
            self._kind = kind
        elif self._usable and self._record(context, enqueue):
            self._cuda.launch(self._recorded)
            return
        enqueue()

    def close(self) -> None:
        """Give the recording back; nothing of it may be running."""
        recorded, self._recorded, self._kind = self._recorded, None, None
        if recorded is not None:
            with suppress(CheckFailed):
                self._cuda.destroy(recorded)

    def _record(self, context: Any, enqueue: Callable[[], None]) -> bool:
        try:
            able = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX has it since 1.2
            if able is not None and not able(self._cuda.stream):
                raise CheckFailed("TensorRT says that it cannot be recorded", hint="build the bundle again")
            self._recorded = self._cuda.record(enqueue)
        except CheckFailed as e:
            self._usable = False
            logger.warning("decoding without a CUDA graph, which is slower: %s", e.message)
        return self._usable
