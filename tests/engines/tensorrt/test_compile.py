"""TensorRT-RTX: real builds of a tiny decoder without a GPU, counted kernel by kernel."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from random_llama import (
    HIDDEN,
    INNER,
    LAYERS,
    LIMITS,
    edited,
    export,
    replace_tensor,
    scale_the_contracting_axis,
)

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.tensorrt.compile import PlanRequest, why_not_run
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD, Flavour
from cushion_deploy.errors import CheckFailed, UsageError


def test_a_plan_holds_every_linear_in_int8_and_fused_attention(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    options = dataclasses.replace(LIMITS, targets=(), max_batch=2)
    artifact = rtx.compile(graph, tmp_path, options)
    name = "sm80+sm86+sm89+sm120.engine"
    assert sorted(os.listdir(tmp_path)) == ["engine.json", name]
    assert artifact.files == (name, "engine.json")
    assert (tmp_path / name).stat().st_size == artifact.details["plan_bytes"] > 1_000_000
    assert artifact.targets == RTX.default_targets
    # Per layer q, k, v, o, gate, up, down in four packed products; and the head.
    assert (artifact.linears, artifact.int8_linears) == (7 * LAYERS + 1, 7 * LAYERS + 1)
    assert artifact.details["int8_gemms"] == [4 * LAYERS + 1] * 2
    assert artifact.fused_attention == LAYERS
    assert artifact.details["attention_matmuls"] == 2 * LAYERS
    assert artifact.details["unknown_gemms"] == artifact.details["float_linears"] == []
    assert artifact.details["peak_rss_bytes"] > artifact.details["plan_bytes"]
    assert not artifact.ran
    assert artifact.details["not_run"].startswith("not run: ")
    read = EngineArtifact.from_json(json.loads((tmp_path / "engine.json").read_text()))
    assert read.to_json() == json.loads(json.dumps(artifact.to_json())) | {
        "targets": artifact.targets,
        "files": artifact.files,
    }


def test_a_head_left_in_floating_point_is_named_and_not_missed(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", quantize_head=False), tmp_path / "engine", LIMITS)
    assert (artifact.linears, artifact.int8_linears) == (7 * LAYERS, 7 * LAYERS)
    assert len(artifact.details["linears_without_site"]) == 1
    assert artifact.details["linears_without_site"][0].startswith("head/")


def test_a_linear_that_silently_lost_int8_fails_the_build_unless_permitted(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    broken = edited(graph, tmp_path, scale_the_contracting_axis)
    folder = tmp_path / "engine"
    folder.mkdir()
    with pytest.raises(CheckFailed, match=r"13 of 15 linears .*layers\.1\.mlp\.gate_up.*contracting axis 0") as caught:
        rtx.compile(broken, folder, LIMITS)
    assert "--allow-float-linears 2" in caught.value.hint
    assert list(folder.iterdir()) == []
    artifact = rtx.compile(broken, folder, dataclasses.replace(LIMITS, allow_float_linears=2))
    assert (artifact.linears, artifact.int8_linears) == (15, 13)
    assert artifact.details["float_linears"] == ["layers.1.mlp.gate_up"]
    assert {fallback["reason"].partition(":")[0] for fallback in artifact.details["fallbacks"]} == {"weight-scales"}


def test_errors_of_the_parser_name_the_node(rtx: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    def shift(model: onnx.ModelProto) -> None:
        replace_tensor(model, "zero_point", np.array(3, np.int8))

    broken = edited(graph, tmp_path, shift)
    with pytest.raises(CheckFailed, match=r"layers\.0\.attn/.*Q.*zero.?point") as caught:
        rtx.compile(broken, tmp_path, LIMITS)
    assert "cannot read the graph" in caught.value.message
    assert not list(tmp_path.glob("*.engine"))


def test_a_disk_without_room_for_the_plan_is_a_usage_error(rtx: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UsageError, match="cannot write"):
            rtx.compile(graph, tmp_path, LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_key_changes_with_everything_that_decides_about_a_plan(graph: ExportedGraph) -> None:
    def key(
        flavour: Flavour = RTX,
        of: ExportedGraph = graph,
        version: str = "1.7.1.116",
        targets: tuple[str, ...] = ("sm86",),
        options: CompileOptions = LIMITS,
    ) -> str:
        return PlanRequest(flavour, of, version, targets, options).key

    keys = [
        key(),
        key(of=dataclasses.replace(graph, digest="0" * 64)),
        key(flavour=STANDARD),
        key(version="1.7.2"),
        key(targets=("sm86", "sm89")),
        key(options=dataclasses.replace(LIMITS, max_context=65)),
        key(options=dataclasses.replace(LIMITS, allow_float_linears=1)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_why_a_plan_was_not_run_follows_from_the_devices() -> None:
    assert why_not_run([], ["sm86"]) == "not run: no NVIDIA GPU on this machine"
    assert "sm75 NVIDIA T4 is none of the targets sm86" in why_not_run(["sm75 NVIDIA T4"], ["sm86"])
    assert "executes nothing" in why_not_run(["sm86 NVIDIA GeForce RTX 3090"], ["sm86"])


@pytest.mark.parametrize(("dtype", "fused"), [("bfloat16", LAYERS), ("float32", 0)])
def test_plans_of_other_types_run_every_linear_in_int8(rtx: TensorRt, dtype: Any, fused: int, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", dtype=dtype), tmp_path / "engine", LIMITS)
    assert artifact.int8_linears == 7 * LAYERS + 1
    # FP32 graphs have no fused attention.
    assert (artifact.fused_attention, artifact.details["dtype"]) == (fused, dtype)
    assert artifact.details["half_accumulators"] == []
    assert artifact.details["linears_without_site"] == []


def test_the_command_of_the_vendors_tool_is_kept_with_the_plan(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    words = shlex.split(rtx.compile(graph, tmp_path, LIMITS).details["command"])
    assert words[:3] == ["tensorrt_rtx", "--onnx=model.onnx", "--saveEngine=sm86.engine"]
    largest = next(word for word in reversed(words) if word.startswith("--maxShapes="))
    assert "past_key_values.1.value:1x2x63x16" in largest.split(",")


def per_channel_activation(model: onnx.ModelProto) -> None:
    """Scale an activation per channel: valid ONNX, no INT8."""
    name = "layers.1.mlp.gate_up"
    for node in model.graph.node:
        if f"{name}.scale" in node.input:
            node.input[1], node.input[2] = f"{name}.many", f"{name}.zeros"
            node.attribute.append(onnx.helper.make_attribute("axis", 2))
    model.graph.initializer.append(numpy_helper.from_array(np.full(HIDDEN, 0.02, np.float32), f"{name}.many"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(HIDDEN, np.int8), f"{name}.zeros"))


def float_weight(model: onnx.ModelProto) -> None:
    """Leave a weight in floating point behind a quantized activation: valid ONNX, no INT8."""
    name = "layers.1.mlp.gate_up"
    dq = next(n for n in model.graph.node if f"{name}.weight_codes" in n.input)
    product = next(n for n in model.graph.node if dq.output[0] in n.input)
    product.input[1] = f"{name}.weight"
    model.graph.node.remove(dq)
    model.graph.initializer.append(
        numpy_helper.from_array(np.full((HIDDEN, 2 * INNER), 0.01, np.float32), f"{name}.weight")
    )


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (per_channel_activation, "activation-scales: the activation has more than one scale"),
        (float_weight, "both-operands: the weight is not quantized"),
        (scale_the_contracting_axis, "weight-scales: the scale of the weight lies on the contracting axis 0"),
    ],
)
def test_a_fallback_names_the_rule_that_its_linear_breaks(
    rtx: TensorRt, graph: ExportedGraph, edit: Any, rule: str, tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    options = dataclasses.replace(LIMITS, allow_float_linears=2)
    artifact = rtx.compile(edited(graph, tmp_path, edit), folder, options)
    assert artifact.int8_linears == 13
    found = [(f["site"], f["profile"], f["reason"]) for f in artifact.details["fallbacks"]]
    assert found == [("layers.1.mlp.gate_up", 0, rule), ("layers.1.mlp.gate_up", 1, rule)]


def test_scales_in_half_show_their_hazard_in_the_plan_report(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", scale_dtype="float16"), tmp_path / "engine", LIMITS)
    assert artifact.int8_linears == 7 * LAYERS + 1
    # Every packed product of both profiles: channels are scaled behind it, and its sum is written as half.
    assert len(artifact.details["half_accumulators"]) == 2 * (4 * LAYERS + 1)
