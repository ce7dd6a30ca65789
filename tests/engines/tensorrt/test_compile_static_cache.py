"""TensorRT-RTX compiles a static cache: updated in place, every linear in INT8, attention in one kernel a layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.profiles import Limits, profile_shapes
from cushion_deploy.export.write import export_graph

LIMITS = CompileOptions(("sm86",), max_batch=2, max_context=48, max_prefill=16)


def export(model: Any, folder: Path, dtype: Any, capacity: int) -> ExportedGraph:
    """Export with constant scales: a plan does not depend on how good they are."""
    prefix = model.compute_prefix((7, 1))
    digest = model.spec.weights_digest
    scales = ActivationScales(
        dict.fromkeys(model.sites, 0.05), "max", Lineage(digest, prefix.digest, text="none"), tokens=1
    )
    folder.mkdir()
    quantization = Quantization(prefix, QuantScheme(quantize_head=True), scales)
    form = GraphForm(dtype=dtype, cache="static", capacity=capacity, prefix="cache")
    return export_graph(model.spec, model.weights, quantization, form, folder)


@pytest.mark.parametrize(("dtype", "fused"), [("float16", True), ("float32", False)])
def test_every_linear_runs_in_int8_and_attention_reads_the_cache_where_it_lies(
    dtype: str, fused: bool, rtx: TensorRt, tiny_model: Any, tmp_path: Path
) -> None:
    graph = export(tiny_model, tmp_path / "graph", dtype, 50)
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(graph, tmp_path / "engine", LIMITS)
    layers = tiny_model.spec.num_layers
    assert artifact.int8_linears == artifact.linears == 7 * layers + 1
    assert artifact.fused_attention == (layers if fused else 0)
    # One a layer, of its keys; where attention is written as two products, keys and values are copied once more.
    assert max(artifact.details["moves"]) <= layers
    assert artifact.details["unknown_gemms"] == []


def test_attention_without_a_kernel_of_its_own_falls_apart_and_builds(
    rtx: TensorRt, tiny_writer: Any, tmp_path: Path
) -> None:
    from cushion_deploy.modeling.load import load_folder
    from cushion_deploy.modeling.source import resolve_source

    folder = tiny_writer(tmp_path / "model", head_dim=20, num_hidden_layers=1)
    graph = export(load_folder(folder, resolve_source(str(folder))), tmp_path / "graph", "float16", 50)
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(graph, tmp_path / "engine", LIMITS)
    assert artifact.int8_linears == artifact.linears


@pytest.mark.parametrize(("capacity", "context"), [(50, 48), (30, 28), (64, 48)])
def test_every_point_of_a_profile_has_the_whole_cache(capacity: int, context: int) -> None:
    contract = GraphContract(2, 3, 8, 32, 256, "float16", 2, prefix_in_cache=True, cache_capacity=capacity)
    limits = Limits.of(LIMITS, contract)
    assert limits == Limits(2, context, 16)
    for name, shapes in profile_shapes(contract, limits).items():
        for point, (batch, longest) in enumerate(((1, 1), (1, 16), (2, 16))):
            assert list(shapes["input_ids"][point]) == [batch, 1 if name == "decode" else longest]
            assert list(shapes["attention_mask"][point]) == [batch, capacity]
            assert list(shapes["write_indices"][point]) == [batch]
            for i in range(2):
                for part in ("key", "value"):
                    assert list(shapes[f"past_key_values.{i}.{part}"][point]) == [batch, 3, capacity, 8]
    growing = dataclasses.replace(contract, cache_capacity=0)
    assert "write_indices" not in profile_shapes(growing, Limits.of(LIMITS, growing))["decode"]
