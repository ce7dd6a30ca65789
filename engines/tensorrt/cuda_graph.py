"""A decode step as a CUDA graph: captured once, launched for every further token.

Only a step whose shapes and addresses do not change can be captured: a decode step with a static cache. TensorRT-RTX
can capture by itself (``IRuntimeConfig.cuda_graph_strategy``), but standard TensorRT cannot; this serves both.
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
    """Captures the second step of a key, and launches the captured graph from then on.

    The first step runs without capture: TensorRT requires that a context has run with the same shapes before, and it
    compiles and loads kernels in that run, which cannot be captured. If a plan cannot be captured at all, every step
    runs without capture, after one warning.
    """

    def __init__(self, cuda: Cuda) -> None:
        """Start without a graph."""
        self._cuda = cuda
        self._key: Hashable = None
        self._graph: Any = None
        self._usable = True

    def is_bound(self, key: Hashable) -> bool:
        """Return whether the last step had this key, so that its shapes and addresses are still bound."""
        return key == self._key

    def launch(self, key: Hashable) -> bool:
        """Queue the captured step of a key; return False, with nothing queued, if there is none.

        Inputs must be at the addresses that were bound at the capture.
        """
        if self._graph is None or key != self._key:
            return False
        self._cuda.launch(self._graph)
        return True

    def run(self, key: Hashable, context: Any, enqueue: Callable[[], None]) -> None:
        """Queue a step that is not captured yet: the first of its key as it is, the second by capturing it.

        Args:
            key: everything that the shapes of the step depend on; the graph of another key is destroyed.
            context: execution context with every input bound.
            enqueue: queues the step on the stream; raises CheckFailed if the plan refuses.
        """
        if key != self._key:
            self.close()
            self._key = key
        elif self._usable and self._capture(context, enqueue):
            self._cuda.launch(self._graph)
            return
        enqueue()

    def close(self) -> None:
        """Destroy the graph, which must not be running."""
        graph, self._graph, self._key = self._graph, None, None
        if graph is not None:
            with suppress(CheckFailed):
                self._cuda.destroy(graph)

    def _capture(self, context: Any, enqueue: Callable[[], None]) -> bool:
        try:
            able = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX has it since 1.2
            if able is not None and not able(self._cuda.stream):
                raise CheckFailed("TensorRT reports that the step cannot be captured", hint="build the bundle again")
            self._graph = self._cuda.capture(enqueue)
        except CheckFailed as e:
            self._usable = False
            logger.warning("decoding without a CUDA graph, which is slower: %s", e.message)
        return self._usable
