"""The cache in the memory of a device: bound to a step there, cut there, and never copied to the host between steps.

Only token ids, mask, positions and logits cross. What the host holds, such as a new cache, is copied to the device by
ONNX Runtime when it is bound for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cushion_deploy.engines.onnxruntime.settings import Provider, import_onnxruntime
from cushion_deploy.engines.onnxruntime.slice_graph import slice_graph

LOGITS = "logits"


class DeviceCache:
    """Runs the steps of a session whose provider has memory of its own.

    Args:
        session: the ``InferenceSession`` of the decoder.
        provider: its provider; ``provider.device`` is where the cache lies.
        cache_type: ONNX name of the type of the cache, such as ``tensor(float16)``.
    """

    def __init__(self, session: Any, provider: Provider, cache_type: str) -> None:
        """Load the graph that cuts a cache."""
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        graph = slice_graph(cache_type, rank=4, axis=2)
        self._session, self._device = session, provider.device
        self._slice = ort.InferenceSession(graph, options, providers=provider.chain)
        self._start = ort.OrtValue.ortvalue_from_numpy(np.array([0], dtype=np.int64))

    def step(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """Run the decoder and return its outputs as OrtValues: logits on the host, everything else on the device.

        Args:
            names: outputs to compute, in order.
            feed: inputs, on the device or on the host.
        """
        return self._run(self._session, names, feed)

    def first(self, values: Sequence[Any], slots: int) -> list[Any]:
        """Return the first slots of keys and values ``[B, K, slots, D]``, each cut where it lies."""
        end = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([slots], dtype=np.int64))
        feeds = ({"x": value, "start": self._start, "end": end} for value in values)
        return [self._run(self._slice, ["y"], feed)[0] for feed in feeds]

    def _run(self, session: Any, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        # A binding of its own for each step: outputs must be new values, because caches are held and restored.
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu" if name == LOGITS else self._device)
        session.run_with_iobinding(binding)
        found: list[Any] = binding.get_outputs()
        return found
