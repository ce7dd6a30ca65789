"""Plans of TensorRT on a real device: what ONNX Runtime computes, without overflow; speed is in bench/gpu.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_plans import IDS, Device, apart, graph_of

from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.tensorrt.coverage.inspector import read_inspection
from cushion_deploy.engines.tensorrt.coverage.plan_report import PlanReport
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source


@pytest.fixture(scope="module")
def sessions(
    device: Device, tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DecoderSession, TensorRtSession]]:
    """Return the INT8 graph in ONNX Runtime, and its plan."""
    folder = tmp_path_factory.mktemp("plans")
    prefix = tiny_model.compute_prefix((7, 1))
    expected = open_session(graph_of(tiny_model, prefix, folder / "float32", "float32"), threads=1)
    half = graph_of(tiny_model, prefix, folder / "float16", "float16")
    with device.open_plan(half, folder / "plan") as session:
        yield expected, session


def test_a_plan_computes_what_onnxruntime_computes(sessions: Any) -> None:
    expected, found = (session.run(IDS, need_logits="all") for session in sessions)
    # Free runs of two correct engines drift apart by rounding (cushion_deploy/parity/segments.py): on average, little.
    assert apart(found, expected) <= 0.1
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.8


def test_decoding_equals_prefill_on_the_device(sessions: Any) -> None:
    session = sessions[1]
    session.reset()
    whole = session.run(IDS, need_logits="all")
    session.reset()
    session.run(IDS[:, :40], need_logits="none")
    steps = np.concatenate([session.run(IDS[:, i : i + 1]) for i in range(40, 48)], axis=1)
    assert apart(steps, whole[:, 40:]) <= 0.1


def test_no_accumulator_overflows(device: Device, tiny_writer: Any, tmp_path: Path) -> None:
    def extreme(module: Any) -> None:
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.fill_(0.01)  # every code is 127: a row of products adds up to 260 million
            layer.mlp.gate_proj.weight.abs_()
            layer.mlp.up_proj.weight.abs_()

    folder = tiny_writer(tmp_path / "model", extreme, intermediate_size=16384, num_hidden_layers=1)
    model = load_folder(folder, resolve_source(str(folder)))
    empty = Prefix.empty(model.spec)
    expected = open_session(graph_of(model, empty, tmp_path / "float32", "float32"), threads=1)
    with device.open_plan(graph_of(model, empty, tmp_path / "float16", "float16"), tmp_path / "plan") as session:
        found, wanted = session.run(IDS, need_logits="all"), expected.run(IDS, need_logits="all")
    assert found is not None
    assert np.isfinite(found).all()
    assert apart(found, wanted) <= 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plans_of_other_types_compute_the_same(
    device: Device, dtype: str, tiny_model: TorchRunner, tmp_path: Path
) -> None:
    prefix = tiny_model.compute_prefix((7, 1))
    expected = open_session(graph_of(tiny_model, prefix, tmp_path / "float32", "float32"), threads=1)
    with device.open_plan(graph_of(tiny_model, prefix, tmp_path / "graph", dtype), tmp_path / "plan") as session:
        found = session.run(IDS, need_logits="all")
        assert session.contract.dtype == dtype
    assert apart(found, expected.run(IDS, need_logits="all")) <= 0.2


@pytest.mark.parametrize("in_cache", [False, True], ids=["baked", "cache"])
def test_a_plan_with_an_int8_cache_computes_the_same(
    device: Device, in_cache: bool, tiny_model: TorchRunner, tmp_path: Path
) -> None:
    prefix, spec = tiny_model.compute_prefix((7, 1)), tiny_model.spec
    scale = np.full((spec.num_layers, spec.num_kv_heads), 0.05, np.float32)
    parents = Lineage(spec.weights_digest, prefix.digest, text="none"), 1
    kv = KvScales(scale, scale, "per-head", "max", *parents, with_prefix=in_cache)
    form = {"kv": kv, "cache": "int8", "prefix": "cache" if in_cache else "baked"}
    expected = open_session(graph_of(tiny_model, prefix, tmp_path / "float32", "float32", **form), threads=1)
    graph = graph_of(tiny_model, prefix, tmp_path / "graph", "float16", **form)
    with device.open_plan(graph, tmp_path / "plan") as session:
        whole = session.run(IDS, need_logits="all")
        assert apart(whole, expected.run(IDS, need_logits="all")) <= 0.1
        session.truncate(40)
        steps = np.concatenate([session.run(IDS[:, i : i + 1]) for i in range(40, 48)], axis=1)
    assert whole is not None
    assert apart(steps, whole[:, 40:]) <= 0.1


def test_scales_in_half_beside_scales_in_float32(
    device: Device, tiny_model: TorchRunner, tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Look here first on standard TensorRT: it may fuse scales otherwise than TensorRT-RTX does."""
    empty, told = Prefix.empty(tiny_model.spec), {}
    for scales in ("float32", "float16"):
        graph = graph_of(tiny_model, empty, tmp_path / scales, "float16", scale_dtype=scales)
        artifact = device.compile(graph, tmp_path / f"{scales}-plan")
        details = artifact.details
        told[scales] = {name: details[name] for name in ("kernels", "int8_gemms", "moves", "half_accumulators")}
        record_property(scales, json.dumps(told[scales]))
        assert artifact.int8_linears == artifact.linears
    with capsys.disabled():
        print(f"\n{device.flavour.product}, by type of scales: {json.dumps(told)}")
    # The form that is deployed must never write a bare sum as half.
    assert told["float32"]["half_accumulators"] == []


def test_the_inspector_tells_what_the_build_log_told(device: Device, tiny_model: TorchRunner, tmp_path: Path) -> None:
    if not device.flavour.ahead_of_time:
        pytest.skip("the coverage of this flavour is counted by the inspector alone")
    graph = graph_of(tiny_model, Prefix.empty(tiny_model.spec), tmp_path / "graph", "float16")
    with device.open_plan(graph, tmp_path / "plan") as session:
        found: PlanReport = read_inspection(session.inspect(), len(session.profiles), device.flavour.product)
    details = json.loads((tmp_path / "plan" / "engine.json").read_text())["details"]
    assert list(found.int8_gemms) == details["int8_gemms"]
    assert list(found.half_accumulators) == details["half_accumulators"]
