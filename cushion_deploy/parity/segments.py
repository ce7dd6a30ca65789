"""Run a quantized graph Site by Site: every segment between two quantizers gets the same codes as the reference.

Why not let two runs go freely and compare codes at the end? Rounding is a step: a difference of d codes before
it becomes about sqrt(d) codes (root mean square) after it. So the 1e-6 by which two floating-point libraries
differ is 1e-3 codes after one quantizer, 0.03 after two, and a whole code after five, in any quantized network
and without any error in it. (SmolLM2, free running: 100 % identical codes in layer 0, 99 % in layer 1, about
half in layer 5.) Fed with identical codes, each segment must return identical codes; and if all segments do,
the two graphs are the same function.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
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
from cushion_deploy.engines.onnxruntime.settings import SESSION_CONFIG
from cushion_deploy.parity.bfloat16 import widen
from cushion_deploy.store import place

SiteCodes = dict[Site, npt.NDArray[np.int8]]
Kernels = Literal["literal", "fused"]
LITERAL_CONFIG = {"session.disable_quant_qdq": "1", "session.set_denormal_as_zero": "1"}


class SegmentRun:
    """A graph cut open before every Q node: the Site's input comes from outside, what would enter it goes out.

    The Q nodes of an INT8 cache are cut too, under the names of ``kv_site``: a code there that flips at a tie changes
    what attention reads, as one in a linear's input changes its product.

    ``literal`` runs every node as its definition says, without any optimization; ``fused`` runs the integer
    kernels that the ONNX Runtime engine runs.
    """

    def __init__(self, graph: ExportedGraph, scales: ActivationScales, kernels: Kernels) -> None:
        """Open the cut graph."""
        self.graph, self.scales = graph, scales
        kv = read_cached_scales(graph)
        # Axes of a cache are [1, kv_heads, n, head_dim], those of its codes here [1, n, kv_heads, head_dim].
        self.cached = {kv_site(i, part): s[:, None, None] for i, part, s in kv.rows()} if kv else {}
        self.sites = (*graph.sites, *self.cached)
        self.session = edited_session(graph, lambda model: _cut(model, self.sites), kernels)

    @property
    def room(self) -> int | None:
        """Tokens that fit behind the prefix into a static cache; None for a cache that grows."""
        contract = self.graph.contract
        return contract.cache_capacity - contract.prefix_slots if contract.cache_capacity else None

    def __call__(
        self, ids: IntArray, codes: SiteCodes, past: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> tuple[FloatArray, SiteCodes, dict[str, npt.NDArray[Any]]]:
        """Run every segment on the reference's codes.

        Args:
            ids: int64 ``[1, n]``.
            codes: int8 ``[1, n, features]`` that shall enter each Site, and ``[1, n, kv_heads, head_dim]`` for the
                parts of an INT8 cache.
            past: ``past_key_values.*`` for the tokens before and no more slots, of a static cache too; None for what
                every cache begins with.

        Returns:
            logits ``[1, n, vocab]``, the codes that each segment computes for the Site at its end, and the
            ``present.*`` tensors, without the free slots of a static cache.
        """
        feed: dict[str, npt.NDArray[Any]] = dict(past or first_past(self.graph))
        before = next(iter(feed.values())).shape[2]
        feed.update(token_inputs(ids, before))
        if capacity := self.graph.contract.cache_capacity:
            _give_slots(feed, before, capacity)
        for site in self.sites:
            forced = codes[site].swapaxes(1, 2) if site in self.cached else codes[site]
            feed[f"{site}.forced"] = dequantize(forced, self._step(site))
        names = [output.name for output in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(names, feed), strict=True))
        computed = {site: quantize(out[f"{site}.input"], self._step(site)) for site in codes if site in self.sites}
        computed |= {site: computed[site].swapaxes(1, 2) for site in self.cached}
        end = before + ids.shape[1]
        present = {name: value[:, :, :end] for name, value in out.items() if name.startswith("present.")}
        return out["logits"], computed, present

    def _step(self, site: Site) -> FloatArray | float:
        return self.cached[site] if site in self.cached else self.scales.scales[site]


def edited_session(graph: ExportedGraph, edit: Callable[[Any], None], kernels: Kernels) -> Any:
    """Return an ONNX Runtime session of a copy of the graph that ``edit`` changed; the graph itself stays as it is."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if kernels == "literal":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (LITERAL_CONFIG if kernels == "literal" else SESSION_CONFIG).items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory(prefix="cushion-parity-") as name:
        data, widened = graph.files[1], graph.contract.dtype == "bfloat16"
        # Copied where it is read here: the library takes a second hard link of external data for an attack.
        place(data, Path(name) / data.name, link=not widened)
        path = Path(name) / graph.path.name
        model = ir.load(graph.path)
        if widened:
            widen(model)
        edit(model)
        ir.save(model, path, external_data="widened.data" if widened else None)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def show_input(model: Any, value: Any, site: Site) -> None:
    """Make a float32 value of the graph its output ``<site>.input`` too."""
    import onnx_ir as ir

    # An Identity, because the tensor may already be a graph output or have other consumers.
    shown = ir.node("Identity", [value], name=f"{site}.show")
    shown.outputs[0].name = f"{site}.input"
    shown.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(shown)
    model.graph.outputs.append(shown.outputs[0])


def token_inputs(ids: IntArray, before: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a graph for tokens ``[batch, n]`` without padding, after ``before`` tokens of the cache."""
    rows, end = ids.shape[0], before + ids.shape[1]
    positions = np.arange(before, end, dtype=np.int64)[None].repeat(rows, 0)
    mask = np.ones((rows, end), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def first_past(graph: ExportedGraph) -> dict[str, npt.NDArray[Any]]:
    """Return the ``past_key_values.*`` that one row begins with: the prefix where it belongs there, or nothing."""
    prefix = read_cached_prefix(graph)
    first = first_caches(graph.contract, prefix, 1, read_cached_scales(graph))
    return dict(zip(past_names(graph.contract), first, strict=True))


def _give_slots(feed: dict[str, npt.NDArray[Any]], before: int, capacity: int) -> None:
    """Make the inputs of a growing cache those of a static one: free slots, and where the first token belongs."""
    for name, value in feed.items():
        if name.startswith("past_key_values."):
            feed[name] = np.pad(value, ((0, 0), (0, 0), (0, capacity - before), (0, 0)))
    mask = feed["attention_mask"]
    feed["attention_mask"] = np.pad(mask, ((0, 0), (0, capacity - mask.shape[1])))
    feed["write_indices"] = np.full(len(mask), before, dtype=np.int64)


def _cut(model: Any, sites: tuple[Site, ...]) -> None:
    """Feed the Q node of each Site from a new input ``<site>.forced``, and show its old input as ``<site>.input``."""
    import onnx_ir as ir

    quantizers = {node.outputs[0].name: node for node in model.graph if node.op_type == "QuantizeLinear"}
    for site in sites:
        node = quantizers[f"{site}.codes"]
        show_input(model, node.inputs[0], site)
        forced = ir.Value(
            name=f"{site}.forced",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=node.inputs[0].shape or ir.Shape(["batch", *[None] * (3 if ".kv." in site else 2)]),
        )
        model.graph.inputs.append(forced)
        node.replace_input_with(0, forced)
