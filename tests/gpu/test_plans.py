"""Plans of TensorRT-RTX on a real device: what ONNX Runtime computes, without overflow, and how fast beside FP16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.evaluate.speed import Workload, compare, time_sessions
from cushion_deploy.export.folder import export_graph
from cushion_deploy.modeling.forward import compute_prefix
from cushion_deploy.modeling.load import LoadedModel, load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.runtime.onnxruntime import open_session
from cushion_deploy.runtime.session import DecoderSession
from cushion_deploy.runtime.tensorrt import TensorRtSession
from cushion_deploy.schemes import QuantScheme
from cushion_deploy.types import ActivationScales, ExportedGraph, Prefix

IDS = np.random.default_rng(0).integers(5, 300, (1, 48))
LIMITS = {"max_batch": 2, "max_context": 200, "max_prefill": 64}


def graph_of(model: LoadedModel, prefix: Prefix, folder: Path, dtype: Any, *, quantized: bool = True) -> ExportedGraph:
    """Export a model with constant scales: what a plan computes does not depend on how good they are."""
    scales = None
    if quantized:
        sites = dict.fromkeys(model.sites, 0.05)
        digest = model.spec.weights_digest
        scales = ActivationScales(sites, "max", digest, prefix.digest, corpus_digest="none", tokens=1)
    folder.mkdir()
    return export_graph(model.spec, model.weights, prefix, scales, QuantScheme(quantize_head=True), folder, dtype=dtype)


def open_plan(graph: ExportedGraph, folder: Path, target: str) -> TensorRtSession:
    """Compile a graph for the device and open the plan."""
    folder.mkdir()
    artifact = ENGINES["tensorrt-rtx"].compile(graph, folder, CompileOptions((target,), **LIMITS))
    return TensorRtSession((folder / artifact.files[0]).read_bytes(), graph.contract, "tensorrt_rtx")


def apart(found: Any, expected: Any) -> float:
    """Return how far the logits of the median token are apart, as a share of their size (root mean square).

    The median, because in a free run a single token may fall on the other side of many ties at once.
    """
    distance, size = ((x**2).mean(axis=-1) ** 0.5 for x in (found - expected, expected))
    return float(np.median(distance / size))


@pytest.fixture(scope="module")
def sessions(
    target: str, tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DecoderSession, TensorRtSession]]:
    """Return the INT8 graph in ONNX Runtime, and its plan."""
    folder = tmp_path_factory.mktemp("plans")
    prefix = compute_prefix(tiny_model, (7, 1))
    expected = open_session(graph_of(tiny_model, prefix, folder / "float32", "float32"), threads=1)
    half = graph_of(tiny_model, prefix, folder / "float16", "float16")
    with open_plan(half, folder / "plan", target) as session:
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


def test_no_accumulator_overflows(target: str, tiny_writer: Any, tmp_path: Path) -> None:
    def extreme(module: Any) -> None:
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.fill_(0.01)  # every code is 127: a row of products adds up to 260 million
            layer.mlp.gate_proj.weight.abs_()
            layer.mlp.up_proj.weight.abs_()

    folder = tiny_writer(tmp_path / "model", extreme, intermediate_size=16384, num_hidden_layers=1)
    model = load_folder(folder, resolve_source(str(folder)))
    empty = Prefix.empty(model.spec)
    expected = open_session(graph_of(model, empty, tmp_path / "float32", "float32"), threads=1)
    with open_plan(graph_of(model, empty, tmp_path / "float16", "float16"), tmp_path / "plan", target) as session:
        found, wanted = session.run(IDS, need_logits="all"), expected.run(IDS, need_logits="all")
    assert found is not None
    assert np.isfinite(found).all()
    assert apart(found, wanted) <= 0.1


def test_speed_beside_a_float16_plan(
    target: str, tiny_writer: Any, tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    folder = tiny_writer(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=64)
    model = load_folder(folder, resolve_source(str(folder)))
    empty = Prefix.empty(model.spec)
    plain = graph_of(model, empty, tmp_path / "half", "float16", quantized=False)
    with (
        open_plan(graph_of(model, empty, tmp_path / "int8", "float16"), tmp_path / "a", target) as int8,
        open_plan(plain, tmp_path / "b", target) as half,
    ):
        workload = Workload(64, 32, 1, 5)
        times = time_sessions({"int8": int8, "float16": half}, workload)
        ratio = compare(times["int8"], times["float16"], workload)
    for name in ("prefill", "decode"):
        record_property(name, getattr(ratio, name))
    with capsys.disabled():
        print(f"\nINT8 beside float16 on {target}: prefill {ratio.prefill:.2f} x, decode {ratio.decode:.2f} x")
    assert ratio.prefill > 0
    assert ratio.decode > 0
