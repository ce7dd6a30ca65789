"""Plans with a static cache on a real device: updated in place, decoded as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_plans import CONTEXT, IDS, Device, apart, graph_of

from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.modeling.runner import TorchRunner


@pytest.fixture(scope="module")
def plan(
    device: Device, tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, TensorRtSession]]:
    """Return the growing graph in ONNX Runtime, and the plan of the static one."""
    if not ENGINES[device.flavour.name].in_place_cache:
        pytest.skip(f"not run: this {device.flavour.product} updates no cache in place")
    folder = tmp_path_factory.mktemp("static")
    prefix = tiny_model.compute_prefix((7, 1))
    growing = graph_of(tiny_model, prefix, folder / "float32", "float32", prefix="cache")
    form = {"prefix": "cache", "cache": "static", "capacity": CONTEXT + prefix.length}
    with device.open_plan(
        graph_of(tiny_model, prefix, folder / "float16", "float16", **form), folder / "plan"
    ) as session:
        yield open_session(growing, threads=1), session


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the graph launches of a test."""
    from cushion_deploy.engines.tensorrt.cuda import Cuda

    made: list[Any] = []
    launch = Cuda.launch
    monkeypatch.setattr(Cuda, "launch", lambda self, recorded: made.append(recorded) or launch(self, recorded))
    return made


def test_a_static_plan_computes_what_onnxruntime_computes(plan: Any) -> None:
    for session in plan:
        session.reset()
    expected, found = (session.run(IDS, need_logits="all") for session in plan)
    assert apart(found, expected) <= 0.1
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.8


def test_decoding_by_launches_equals_prefill(plan: Any, launches: list[Any], caplog: Any) -> None:
    session = plan[1]
    session.reset()
    whole = session.run(IDS, need_logits="all")
    session.truncate(30)
    with caplog.at_level(logging.WARNING):
        steps = np.concatenate([session.run(IDS[:, i : i + 1]) for i in range(30, 48)], axis=1)
    assert caplog.messages == [], "the plan cannot be recorded"
    assert len(launches) >= 17, "the first step runs plainly, every other one is a launch"
    assert apart(steps, whole[:, 30:]) <= 0.1


def test_a_left_padded_batch_is_its_rows(plan: Any) -> None:
    session = plan[1]
    batch = np.concatenate([IDS[:, :20], IDS[:, 20:40]])
    mask = np.ones((2, 30), dtype=np.int64)
    mask[1, :5] = 0
    alone = []
    for row in (IDS[:, :20], IDS[:, 25:40]):
        session.reset()
        logits = [session.run(row)]
        alone.append(np.concatenate([*logits, *(session.run(IDS[:, i : i + 1]) for i in range(4))], axis=1))
    session.reset()
    together = [session.run(batch, mask[:, :20])]
    for i in range(4):
        together.append(session.run(IDS[:, i : i + 1].repeat(2, axis=0), mask[:, : 21 + i]))
    for row, found in enumerate(np.concatenate(together, axis=1)):
        assert apart(found, alone[row][0]) <= 0.1
