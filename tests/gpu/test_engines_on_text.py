"""Engines on a real device against fake-quant: SmolLM2 on real text, within the limit of the parity ladder."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from gpu_plans import Device
from real_text import OnText

from cushion_deploy.engines.onnxruntime.compile_graph import compile_graph
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import CUDA
from cushion_deploy.engines.probe import probe
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.runtime.bundle import read_graph

SPACE = 216
"""The prefix that a search finds for SmolLM2."""


@pytest.fixture(scope="module")
def on_text(request: pytest.FixtureRequest) -> OnText:
    """Return SmolLM2 in static W8A8, with the losses of fake-quant."""
    if not probe("onnxruntime").gpus:
        pytest.skip("not run: no GPU")
    smollm2: TorchRunner = request.getfixturevalue("smollm2")
    return OnText.of(smollm2, (SPACE,), windows=16)


@pytest.fixture
def cuda() -> None:
    """Skip where ONNX Runtime has no CUDA provider."""
    if CUDA.name not in onnxruntime.get_available_providers():
        pytest.skip(f"not run: this ONNX Runtime has no {CUDA.name}; {CUDA.install}")


def test_a_plan_is_within_the_limit_of_the_ladder(device: Device, on_text: OnText, tmp_path: Path) -> None:
    with device.open_plan(on_text.graph(tmp_path / "float16", "float16"), tmp_path / "plan") as session:
        check = on_text.check(session)
    assert check.passed, check


@pytest.mark.usefixtures("cuda")
def test_the_cuda_provider_is_within_the_limit_of_the_ladder(on_text: OnText, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    compile_graph(on_text.graph(tmp_path / "float16", "float16"), tmp_path / "own", CUDA)
    session = open_session(read_graph(tmp_path / "own"), provider=CUDA)
    check = on_text.check(session)
    assert check.passed, (check, session.remarks)
    assert {value.device_name() for value in session.hold().values} == {"cuda"}, "the cache never left the device"


@pytest.mark.usefixtures("cuda")
def test_a_bundle_without_a_graph_of_its_own_is_within_it_too(on_text: OnText, tmp_path: Path) -> None:
    session = open_session(on_text.graph(tmp_path / "float32", "float32"), provider=CUDA)
    check = on_text.check(session)
    assert check.passed, (check, session.remarks)


@pytest.mark.usefixtures("cuda")
def test_steps_behind_a_cut_cache_are_those_of_a_new_one(on_text: OnText, tmp_path: Path) -> None:
    graph, ids = on_text.graph(tmp_path / "float32", "float32"), on_text.reference.ids
    session = open_session(graph, provider=CUDA)
    session.run(ids, need_logits="none")
    session.truncate(40)
    found = session.run(ids[:, 40:48], need_logits="all")
    session.reset()
    session.run(ids[:, :40], need_logits="none")
    expected = session.run(ids[:, 40:48], need_logits="all")
    assert found is not None
    assert expected is not None
    assert abs(found - expected).max() <= 1e-3 * abs(expected).max()
