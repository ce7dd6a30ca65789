"""Write a decoder graph and its external data into a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.artifacts import write_kv_scales, write_prefix
from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvScales, kv_site
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import WeightSource
from cushion_deploy.errors import UsageError
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.decoder import DecoderGraph
from cushion_deploy.export.prefix_kv import PrefixKv
from cushion_deploy.export.rules import check_graph
from cushion_deploy.families import get_family
from cushion_deploy.families.folding import FoldedWeights
from cushion_deploy.store import hash_file
from cushion_deploy.store.digests import digest_json

MIN_OPSET, MAX_OPSET = 17, 22
"""17 serves every TensorRT from 10.3 on; above 22 the operators of the graph change meaning or are untested."""
STATIC_OPSET = 24
"""Brought TensorScatter, which updates a static cache. What else changed since 22 (Cast, Reshape, Shape, Transpose,
Squeeze, Unsqueeze, Identity, QuantizeLinear, DequantizeLinear) is new types, and attributes that the graph leaves at
their default; so a static graph is written for it, and no other graph."""
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def export_graph(
    spec: ModelSpec,
    weights: WeightSource,
    prefix: Prefix,
    scales: ActivationScales | None,
    scheme: QuantScheme,
    folder: Path,
    *,
    smoothing: Smoothing | None = None,
    kv: KvScales | None = None,
    name: str = "model",
    dtype: Dtype = "float32",
    prefix_in_cache: bool = False,
    capacity: int = 0,
    opset: int = MIN_OPSET,
    scale_dtype: Dtype = "float32",
) -> ExportedGraph:
    """Write ``<name>.onnx`` and ``<name>.onnx.data``, and beside them what a caller needs to begin and read a cache.

    Args:
        spec, weights: the model.
        prefix: becomes initializers of the graph; an empty one leaves no trace.
        scales: static activation scales; None writes the float twin.
        scheme: what to quantize.
        folder: existing folder.
        smoothing: folded into the weights on the way; the scales must have been calibrated under it.
        kv: scales of an INT8 cache, which are written as ``kv_scales.json`` too; None for one in floating point.
        name: file stem.
        dtype: type of activations, caches and floating-point weights.
        prefix_in_cache: leave the prefix out of the graph and write it beside it as ``prefix.safetensors``: whoever
            runs the graph begins every cache with it.
        capacity: slots of a static cache, those of the prefix included, that the graph updates in place; 0 for a cache
            that grows. The opset is then ``STATIC_OPSET``.
        opset: default-domain opset.
        scale_dtype: type of scales and of quantized products. Not float32 is an experiment: a half accumulator can
            overflow, which the plan report tells.

    Raises:
        UsageError: a scheme that is not deployable, parents that do not belong together, a Site without scale,
            an opset out of range, a capacity that the prefix or the model does not allow.
        CheckFailed: the finished graph breaks a rule that TensorRT needs.
    """
    _check_deployable(scheme, scales)
    _check_parents(spec, prefix, scales, smoothing, opset)
    if capacity:
        _check_capacity(spec, prefix, prefix_in_cache, capacity)
        opset = STATIC_OPSET
    if kv is not None:
        _check_cache(spec, prefix, kv, smoothing, prefix_in_cache)
        if capacity:
            raise UsageError("an INT8 cache cannot be static", hint="leave the capacity or export.kv_cache=int8 out")
    family = get_family(spec.family)
    if smoothing:
        weights = FoldedWeights(weights, family, spec, smoothing)
    sites = scheme.of(family.linears(spec, head=True))
    chosen: dict[Site, float] = {}
    if scales is not None:
        chosen = scales.of(sites)
    element = DTYPES[dtype]
    if dtype == "float16":
        _check_range(prefix)
    decoder = DecoderGraph(
        GraphBuilder(opset),
        spec,
        family,
        weights,
        PrefixKv(Prefix.empty(spec) if prefix_in_cache else prefix, element),
        element,
        chosen,
        scale_dtype=DTYPES[scale_dtype],
        capacity=capacity,
        kv=kv,
    )
    model = decoder.build()
    path = folder / f"{name}.onnx"
    ir.save(model, path, external_data=f"{name}.onnx.data", alignment=4096)
    cached = {kv_site(layer, part) for layer, part, _ in kv.rows()} if kv is not None else set()
    checked = scales is not None or cached
    rules = check_graph(ir.load(path), set(chosen), cached, decoder.scale_dtype) if checked else []
    graph = ExportedGraph(
        path=path,
        contract=GraphContract(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            dtype=dtype,
            prefix_length=prefix.length,
            prefix_in_cache=prefix_in_cache and prefix.length > 0,
            cache_capacity=capacity,
            quantized_cache=kv is not None,
        ),
        quantized=scales is not None,
        sites={site: len(paths) for site, paths in sites.items()},
        rules=tuple(rules),
        opset=opset,
        digest="",
        lineage=Lineage(
            model=spec.weights_digest,
            prefix=prefix.digest,
            smoothing=smoothing.digest if smoothing else "",
            scheme=scheme.digest,
            scales=scales.digest if scales else "",
            kv_scales=kv.digest if kv else "",
        ),
    )
    if graph.contract.prefix_slots:
        write_prefix(prefix, folder / PREFIX_FILE)
    if kv is not None:
        write_kv_scales(kv, folder / KV_SCALES_FILE)
    return replace(graph, digest=digest_json({file.name: hash_file(file) for file in graph.files}))


def _check_deployable(scheme: QuantScheme, scales: ActivationScales | None) -> None:
    reason = scheme.why_not_deployable
    if not reason and scales is not None and (scales.zero_points or scales.bits != 8):
        reason = f"the scales are for {scales.bits} bits" + (" with zero points" if scales.zero_points else "")
    if reason:
        raise UsageError(
            f"scheme {scheme.name} cannot be exported: {reason}",
            hint="export w8a8 with symmetric 8-bit scales; everything else is for evaluation alone",
        )


def _check_range(prefix: Prefix) -> None:
    largest = max(float(np.abs(part).max(initial=0.0)) for part in (prefix.keys, prefix.values))
    if largest > np.finfo(np.float16).max:
        raise UsageError(
            f"the prefix reaches {largest:,.0f}, and float16 ends at 65,504", hint="compile plans with --dtype bf16"
        )


def _check_capacity(spec: ModelSpec, prefix: Prefix, prefix_in_cache: bool, capacity: int) -> None:
    if prefix.length and not prefix_in_cache:
        raise UsageError(
            "a static cache cannot be joined with a prefix inside of the graph",
            hint="put the prefix into the cache: --set export.prefix=cache",
        )
    if not prefix.length < capacity <= spec.max_positions:
        raise UsageError(
            f"a static cache of {capacity} slots does not fit a prefix of {prefix.length} and a model of "
            f"{spec.max_positions} positions",
            hint=f"give {prefix.length + 1} to {spec.max_positions} slots, by tensorrt.max_context",
        )


def _check_parents(
    spec: ModelSpec, prefix: Prefix, scales: ActivationScales | None, smoothing: Smoothing | None, opset: int
) -> None:
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset} is not supported", hint=f"choose {MIN_OPSET} to {MAX_OPSET}")
    if prefix.model_digest != spec.weights_digest:
        raise UsageError("the prefix was made for another model", hint="run `cushion-deploy search` for this model")
    if scales is None:
        return
    if scales.lineage.model != spec.weights_digest:
        raise UsageError("the scales were made for another model", hint="run `cushion-deploy calibrate` for this model")
    if scales.lineage.smoothing != (smoothing.digest if smoothing else ""):
        raise UsageError(
            "the scales were calibrated under another smoothing",
            hint="run `cushion-deploy calibrate` again, and give both of its files",
        )
    if scales.lineage.prefix != prefix.digest:
        raise UsageError(
            "the scales were calibrated under another prefix", hint="run `cushion-deploy calibrate` with this prefix"
        )


def _check_cache(
    spec: ModelSpec, prefix: Prefix, kv: KvScales, smoothing: Smoothing | None, prefix_in_cache: bool
) -> None:
    shape = (spec.num_layers, spec.num_kv_heads)
    if kv.lineage.model != spec.weights_digest or kv.keys.shape != shape:
        raise UsageError("the cache scales were made for another model", hint="calibrate the cache for this model")
    if kv.lineage.prefix != prefix.digest or kv.lineage.smoothing != (smoothing.digest if smoothing else ""):
        raise UsageError(
            "the cache scales were calibrated under another prefix or smoothing",
            hint="calibrate the cache again, behind this prefix",
        )
    if kv.with_prefix != (prefix_in_cache and prefix.length > 0):
        where = ("inside the graph", "in the cache")
        raise UsageError(
            f"the cache scales are for a prefix {where[kv.with_prefix]}, and it is {where[not kv.with_prefix]}",
            hint="calibrate the cache again with this setting of export.prefix",
        )
