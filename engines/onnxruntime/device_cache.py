"""The cache in the memory of a device: bound to a step, cut and joined there, never copied to the host between steps.

Only token ids, mask, positions and logits cross. What the host holds, such as a new cache, is copied to the device by
ONNX Runtime when it is bound for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cushion_deploy.core.session import RowSlice
from cushion_deploy.engines.onnxruntime.cache_graphs import gather_graph, slice_graph
from cushion_deploy.engines.onnxruntime.settings import CUDA, Provider, import_onnxruntime

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
        self._session, self._device, self._type = session, provider.device, cache_type
        self._copies = _copying(provider)
        self._slice = self._load(slice_graph(cache_type, rank=4, axis=2))
        self._start = _int64(0)
        self._gathers: dict[int, Any] = {}

    def step(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """Run the decoder and return its outputs as OrtValues: logits on the host, everything else on the device.

        Args:
            names: outputs to compute, in order.
            feed: inputs, on the device or on the host.
        """
        return self._run(self._session, names, feed)

    def first(self, values: Sequence[Any], slots: int) -> list[Any]:
        """Return the first slots of keys and values ``[B, K, slots, D]``, each cut where it lies."""
        end = _int64(slots)
        feeds = ({"x": value, "start": self._start, "end": end} for value in values)
        return [self._run(self._slice, ["y"], feed)[0] for feed in feeds]

    def gather(self, slices: Sequence[RowSlice], slots: int) -> list[Any]:
        """Return rows of caches in one cache, each padded on the left with zeros; see ``BatchSession.gather``.

        Args:
            slices: at least one row, none of them empty.
            slots: slots before the first token of every cache, which hold its prefix.
        """
        rows, longest = len(slices), max(s.length for s in slices)
        if rows not in self._gathers:
            self._gathers[rows] = self._load(gather_graph(self._type, rows))
        _, heads, _, size = slices[0].cache.values[0].shape()
        places = {}
        for i, s in enumerate(slices):
            places[f"first{i}"], places[f"kept{i}"] = _int64(s.row, 0), _int64(s.row + 1, slots)
            places[f"begin{i}"] = _int64(s.row, slots + s.begin)
            places[f"end{i}"] = _int64(s.row + 1, slots + s.end)
            places[f"padding{i}"] = _int64(1, heads, longest - s.length, size)
        found = []
        for part in range(len(slices[0].cache.values)):
            caches = {f"x{i}": s.cache.values[part] for i, s in enumerate(slices)}
            found += self._run(self._gathers[rows], ["y"], {**caches, **places})
        return found

    def _load(self, graph: bytes) -> Any:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        return ort.InferenceSession(graph, options, providers=self._copies)

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


def _int64(*values: int) -> Any:
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array(values, dtype=np.int64))


def _copying(provider: Provider) -> list[str]:
    """Return the providers of graphs that only copy: CUDA on its device, because TensorRT compiles for each shape."""
    if provider.device == CUDA.device and CUDA.name in import_onnxruntime().get_available_providers():
        return CUDA.chain
    return provider.chain
