"""Write a decoder graph, its external data, and the prefix or scales that its callers need, into a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from cushion_deploy.core.artifacts import write_kv_scales, write_prefix
from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KV_PARTS, KV_SCALES_FILE, kv_site
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.weights import WeightSource
from cushion_deploy.errors import UsageError
from cushion_deploy.export.builder import DTYPES
from cushion_deploy.export.decoder import DecoderGraph
from cushion_deploy.export.rules import check_graph
from cushion_deploy.families import get_family
from cushion_deploy.families.folding import FoldedWeights
from cushion_deploy.store import hash_file
from cushion_deploy.store.digests import digest_json


def export_graph(
    spec: ModelSpec,
    weights: WeightSource,
    quantization: Quantization,
    form: GraphForm,
    folder: Path,
    *,
    name: str = "model",
) -> ExportedGraph:
    """Write ``<name>.onnx`` and ``<name>.onnx.data``, and the prefix or cache scales that callers of the graph need.

    Nothing is written if model, quantization and form do not fit each other.

    Args:
        spec, weights: the model.
        quantization: prefix, scheme, scales and smoothing; what the form leaves out of it is ignored. The smoothing is
            folded into the weights while they are written.
        form: what the graph looks like. With ``prefix="cache"`` the prefix is written as ``prefix.safetensors``; the
            scales of an INT8 cache are written as ``kv_scales.json``.
        folder: existing folder.
        name: file stem.

    Raises:
        UsageError: a scheme that is not deployable, a model or quantization that does not fit the form
            (:meth:`GraphForm.check`), or a Site without a scale.
        CheckFailed: the finished graph breaks one of the INT8 rules.
    """
    quantization = form.select(quantization)
    _check_deployable(quantization)
    form.check(spec, quantization)
    family, smoothing = get_family(spec.family), quantization.smoothing
    if smoothing:
        weights = FoldedWeights(weights, family, spec, smoothing)
    sites = quantization.scheme.of(family.linears(spec, head=True))
    model = DecoderGraph(spec, weights, quantization, form).build()
    path = folder / f"{name}.onnx"
    ir.save(model, path, external_data=f"{name}.onnx.data", alignment=4096)
    graph = ExportedGraph(
        path=path,
        contract=form.contract(spec, quantization.prefix),
        quantized=form.quantized,
        sites={site: len(paths) for site, paths in sites.items()},
        rules=(),
        opset=form.opset_of(quantization.scheme),
        digest="",
        lineage=quantization.lineage,
        int8_embedding=form.holds_codes(quantization.scheme),
    )
    rules = tuple(check_exported(graph, form.scale_dtype))
    _write_beside(graph, quantization)
    return replace(graph, rules=rules, digest=digest_json({file.name: hash_file(file) for file in graph.files}))


def check_exported(graph: ExportedGraph, scale_dtype: Dtype = "float32") -> dict[str, int]:
    """Check the file of an exported graph against the INT8 rules.

    Returns:
        Name of each rule to the number of nodes or tensors that it examined; empty for a graph without INT8.

    Raises:
        CheckFailed: the graph breaks a rule.
    """
    contract = graph.contract
    layers = range(contract.num_layers if contract.quantized_cache else 0)
    cache = {kv_site(layer, part) for layer in layers for part in KV_PARTS}
    if not graph.quantized and not cache:
        return {}
    sites = set(graph.sites) if graph.quantized else set()
    model, embedding = ir.load(graph.path), graph.int8_embedding
    return check_graph(model, sites, cache, DTYPES[scale_dtype], int8_embedding=embedding)


def _write_beside(graph: ExportedGraph, quantization: Quantization) -> None:
    """Write what callers need to start and read a cache: the prefix, the scales of INT8 codes."""
    if graph.contract.prefix_slots:
        write_prefix(quantization.prefix, graph.path.with_name(PREFIX_FILE))
    if quantization.kv_scales is not None:
        write_kv_scales(quantization.kv_scales, graph.path.with_name(KV_SCALES_FILE))


def _check_deployable(quantization: Quantization) -> None:
    scheme, scales = quantization.scheme, quantization.scales
    reason = scheme.why_not_deployable
    if not reason and scales is not None and (scales.zero_points or scales.bits != 8):
        reason = f"the scales are for {scales.bits} bits" + (" with zero points" if scales.zero_points else "")
    if reason:
        raise UsageError(
            f"scheme {scheme.name} cannot be exported: {reason}",
            hint="export w8a8 with symmetric 8-bit scales; all other schemes are for evaluation only",
        )
