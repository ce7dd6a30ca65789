"""Run a quantized graph in segments: each segment between two quantizers gets the codes of the reference as input.

Comparing the codes of two free runs does not work. Rounding is a step function: a difference of d codes before it
becomes about sqrt(d) codes (root mean square) after it. So a difference of 1e-6 between two floating-point libraries
is 1e-3 codes after one quantizer, 0.03 after two, and a whole code after five, in any quantized network, without any
error. (SmolLM2, free runs: 100 % identical codes in layer 0, 99 % in layer 1, about half in layer 5.) Given identical
codes, each segment must return identical codes; if all segments do, the two graphs compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.artifacts import read_cached_prefix, read_cached_scales
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import dequantize, quantize
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import kv_site
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.session import first_caches, past_names
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.onnxruntime.settings import session_config
from cushion_deploy.parity.rounding import widen

SiteCodes = dict[Site, npt.NDArray[np.int8]]
Kernels = Literal["literal", "fused"]
LITERAL_CONFIG = {"session.disable_quant_qdq": "1", "session.set_denormal_as_zero": "1"}


class SegmentRun:
    """A graph that is cut before every Q node: the input of Q becomes a graph input, its old value a graph output.

    The Q nodes of an INT8 cache are cut too, under the names of ``kv_site``, because a code that flips at a tie changes
    what attention reads.

    ``literal`` kernels run every node as the ONNX specification defines it, without optimization; ``fused`` kernels are
    the integer kernels of the ONNX Runtime engine. In a 16-bit graph the result of every operator is rounded.

    Attributes:
        not_finite: the first Site of the last run whose input has NaN or infinity; None for none.
    """

    not_finite: Site | None = None

    def __init__(self, graph: ExportedGraph, scales: ActivationScales, kernels: Kernels) -> None:
        """Cut the graph; a session of it is opened when it runs."""
        self.graph, self.scales = graph, scales
        kv = read_cached_scales(graph)
        # Axes of a cache are [1, kv_heads, n, head_dim], those of its codes here [1, n, kv_heads, head_dim].
        self.cached = {kv_site(i, part): s[:, None, None] for i, part, s in kv.rows()} if kv else {}
        self.sites = (*graph.sites, *self.cached)
        self._kernels = kernels

    @cached_property
    def session(self) -> Any:
        """The session of the cut graph."""
        return edited_session(self.graph, lambda model: _cut(model, self.sites), self._kernels)

    def close(self) -> None:
        """Free the session until the graph runs again: two cut graphs of a large model need not fit into memory."""
        self.__dict__.pop("session", None)

    @property
    def room(self) -> int | None:
        """Tokens that fit into a static cache behind the prefix; None for a cache that grows."""
        contract = self.graph.contract
        return contract.cache_capacity - contract.prefix_slots if contract.cache_capacity else None

    def __call__(
        self, ids: IntArray, codes: SiteCodes, past: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> tuple[FloatArray, SiteCodes, dict[str, npt.NDArray[Any]]]:
        """Run every segment on the codes of the reference.

        Args:
            ids: int64 ``[1, n]``.
            codes: input of each Site, int8 ``[1, n, features]``, and of the parts of an INT8 cache,
                ``[1, n, kv_heads, head_dim]``.
            past: ``past_key_values.*`` of the tokens before, without the free slots of a static cache; None for the
                initial cache.

        Returns:
            logits ``[1, n, vocab]``, the codes that each segment computes for the Site at its end, and the
            ``present.*`` tensors without the free slots of a static cache.
        """
        feed = {name: as_run(value) for name, value in (past or first_past(self.graph)).items()}
        before = next(iter(feed.values())).shape[2]
        feed.update(token_inputs(ids, before))
        if capacity := self.graph.contract.cache_capacity:
            _add_slots(feed, before, capacity)
        for site in self.sites:
            forced = codes[site].swapaxes(1, 2) if site in self.cached else codes[site]
            feed[f"{site}.forced"] = dequantize(forced, self._step(site))
        names = [output.name for output in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(names, feed), strict=True))
        inputs = {site: out[f"{site}.input"] for site in codes if site in self.sites}
        self.not_finite = next((site for site, x in inputs.items() if not np.isfinite(x).all()), None)
        computed = {}
        for site, x in inputs.items():
            found = _codes(x, self._step(site), feed[f"{site}.forced"])
            computed[site] = found.swapaxes(1, 2) if site in self.cached else found
        end = before + ids.shape[1]
        present = {name: value[:, :, :end] for name, value in out.items() if name.startswith("present.")}
        return out["logits"], computed, present

    def _step(self, site: Site) -> FloatArray | float:
        return self.cached[site] if site in self.cached else self.scales.scales[site]


def edited_session(graph: ExportedGraph, edit: Callable[[Any], None], kernels: Kernels, *, rounded: bool = True) -> Any:
    """Return an ONNX Runtime session of a copy of the graph, changed by ``edit``; the graph itself is not changed.

    A 16-bit graph runs in float32, see :func:`widen`, after the change; ``rounded`` says whether results are rounded.
    """
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without the arena, which would keep what the largest run needed.
    options.enable_cpu_mem_arena = False
    if kernels == "literal":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (LITERAL_CONFIG if kernels == "literal" else session_config()).items():
        options.add_session_config_entry(key, value)
    # The copy stays in memory. Written to a file, it would need a second link to the weights, which outlives a kill and
    # makes the graph unreadable for everyone else.
    data = graph.files[1].resolve()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data.parent))
    model = ir.load(graph.path)
    edit(model)
    if graph.contract.dtype != "float32":
        widen(model, graph.contract.dtype, rounded=rounded)
    return ort.InferenceSession(_serialized(model, data.name), options, providers=["CPUExecutionProvider"])


def _serialized(model: Any, data: str) -> bytes:
    """Return the bytes of a graph whose external tensors lie in the file of that name."""
    import onnx_ir as ir

    proto = ir.to_proto(model)
    for entry in (entry for tensor in proto.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = data
    return bytes(proto.SerializeToString())


def add_output(model: Any, value: Any, site: Site) -> None:
    """Add a float32 value of the graph as its output ``<site>.input``."""
    import onnx_ir as ir

    # Through an Identity, because the value may already be a graph output or have other consumers.
    identity = ir.node("Identity", [value], name=f"{site}.show")
    identity.outputs[0].name = f"{site}.input"
    identity.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(identity)
    model.graph.outputs.append(identity.outputs[0])


def token_inputs(ids: IntArray, before: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Return the graph inputs for tokens ``[batch, n]`` without padding, after ``before`` tokens in the cache."""
    rows, end = ids.shape[0], before + ids.shape[1]
    positions = np.arange(before, end, dtype=np.int64)[None].repeat(rows, 0)
    mask = np.ones((rows, end), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def first_past(graph: ExportedGraph) -> dict[str, npt.NDArray[Any]]:
    """Return the initial ``past_key_values.*`` of one row: the prefix if it belongs in the cache, else empty."""
    prefix = read_cached_prefix(graph)
    first = first_caches(graph.contract, prefix, 1, read_cached_scales(graph))
    return dict(zip(past_names(graph.contract), first, strict=True))


def as_run(cache: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a cache as a graph here takes it: INT8 codes, or float32, in which 16-bit graphs run too."""
    return cache if cache.dtype == np.int8 else cache.astype(np.float32, copy=False)


def _codes(x: FloatArray, step: FloatArray | float, expected: FloatArray) -> npt.NDArray[np.int8]:
    """Return the codes of ``x``; what is not finite, which saturation may hide, gets a code far from ``expected``."""
    finite = np.isfinite(x)
    if finite.all():
        return quantize(x, step)
    codes = quantize(np.where(finite, x, np.float32(0)), step)
    return np.where(finite, codes, np.where(expected < 0, np.int8(127), np.int8(-128)))


def _add_slots(feed: dict[str, npt.NDArray[Any]], before: int, capacity: int) -> None:
    """Convert the inputs of a growing cache to those of a static one: add free slots and ``write_indices``."""
    for name, value in feed.items():
        if name.startswith("past_key_values."):
            feed[name] = np.pad(value, ((0, 0), (0, 0), (0, capacity - before), (0, 0)))
    mask = feed["attention_mask"]
    feed["attention_mask"] = np.pad(mask, ((0, 0), (0, capacity - mask.shape[1])))
    feed["write_indices"] = np.full(len(mask), before, dtype=np.int64)


def _cut(model: Any, sites: tuple[Site, ...]) -> None:
    """Feed each Site's Q node from a new input ``<site>.forced``; its old input becomes output ``<site>.input``."""
    import onnx_ir as ir

    quantizers = {node.outputs[0].name: node for node in model.graph if node.op_type == "QuantizeLinear"}
    for site in sites:
        node = quantizers[f"{site}.codes"]
        add_output(model, node.inputs[0], site)
        forced = ir.Value(
            name=f"{site}.forced",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=node.inputs[0].shape or ir.Shape(["batch", *[None] * (3 if ".kv." in site else 2)]),
        )
        model.graph.inputs.append(forced)
        node.replace_input_with(0, forced)
