"""The TensorRT session on a device that checks every call: the logits of ONNX Runtime, and no contract broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import Context, FakeTensorRt
from fake_plans import close, plan_of

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.errors import CheckFailed, UntrustedArtifact, UsageError
from cushion_deploy.export.write import export_graph


@pytest.fixture(scope="module", params=["float16", "float32"])
def graph(tiny: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the tiny model's graph without optional inputs, as engines take it."""
    folder = tmp_path_factory.mktemp("engine")
    loaded, quantization = tiny.loaded, Quantization(tiny.prefix, QuantScheme())
    form = GraphForm(dtype=request.param, quantized=False, prefix=tiny.graph.contract.prefix_mode)
    return export_graph(loaded.spec, loaded.weights, quantization, form, folder)


@pytest.fixture
def session(device: FakeTensorRt, graph: ExportedGraph, tiny: Any) -> Any:
    """Return a session on the fake device; closed afterwards, with nothing left behind."""
    prefix = tiny.prefix if graph.contract.prefix_in_cache else None
    with TensorRtSession(plan_of(graph), tiny.graph.contract, "tensorrt_rtx", prefix) as opened:
        yield opened
    assert not device.cuda.memory
    assert not device.cuda.streams


@pytest.fixture
def expected(graph: ExportedGraph) -> Any:
    """Return a session of the same graph in ONNX Runtime."""
    return open_session(graph, threads=1)


def test_a_long_prompt_in_pieces_and_tokens_one_by_one(session: Any, expected: Any, ids: Any, device: Any) -> None:
    close(session.run(ids[:, :20], need_logits="all"), expected.run(ids[:, :20], need_logits="all"))
    assert device.executed == [0, 0, 0]  # pieces of 8, 8 and 4 in the prefill profile
    for i in range(20, 24):
        close(session.run(ids[:, i : i + 1]), expected.run(ids[:, i : i + 1]))
    assert device.executed[3:] == [1] * 4
    assert session.length == expected.length == 24
    assert session.run(ids[:, 24:30], need_logits="none") is None
    expected.run(ids[:, 24:30], need_logits="none")
    close(session.run(ids[:, 30:33]), expected.run(ids[:, 30:33]))


def test_a_left_padded_batch(session: Any, expected: Any, ids: Any) -> None:
    batch = np.concatenate([ids[:, :10], ids[:, 10:20]])
    mask = np.ones((2, 10), dtype=np.int64)
    mask[1, :4] = 0
    close(session.run(batch, mask), expected.run(batch, mask))
    grown = np.concatenate([mask, np.ones((2, 1), dtype=np.int64)], axis=1)
    close(session.run(batch[:, :1], grown), expected.run(batch[:, :1], grown))
    with pytest.raises(UsageError, match="batch of 1 rows"):
        session.run(ids[:, :1])
    session.reset()
    expected.reset()
    close(session.run(ids[:, :5]), expected.run(ids[:, :5]))


def test_truncating_keeps_the_beginning_of_every_head(session: Any, expected: Any, ids: Any) -> None:
    batch = np.concatenate([ids[:, :12], ids[:, 12:24]])
    session.run(batch, need_logits="none")
    session.truncate(7)
    expected.run(batch[:, :7], need_logits="none")
    close(session.run(batch[:, :3], need_logits="all"), expected.run(batch[:, :3], need_logits="all"))
    session.truncate(0)
    assert session.length == 0
    with pytest.raises(UsageError, match="cannot keep 5"):
        session.truncate(5)


def test_what_fits_no_profile_is_refused_with_their_names(session: Any, ids: Any, device: Any) -> None:
    ran = len(device.executed)
    with pytest.raises(UsageError, match=r"decode takes a batch of 3.*prefill takes a batch of 3") as caught:
        session.run(ids.repeat(4, axis=0)[:, :2])
    assert "--max-batch" in caught.value.hint
    long = np.tile(ids, (1, 2))
    for length in (61, 65, 70):
        with pytest.raises(UsageError, match=f"a context of {length} tokens is longer than the 60"):
            session.run(long[:, :length])
    assert len(device.executed) == ran, "something ran before the refusal"
    assert session.length == 0


def test_a_call_that_fails_leaves_the_cache_as_it_was(
    session: Any, expected: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    close(session.run(ids[:, :10]), expected.run(ids[:, :10]))
    real, calls = Context.execute_async_v3, []

    def fails_at_the_second(self: Any, stream: int) -> bool:
        calls.append(stream)
        return len(calls) != 2 and real(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "execute_async_v3", fails_at_the_second)
        with pytest.raises(CheckFailed, match="refuses to run in profile 'prefill'"):
            session.run(ids[:, 10:25])
    assert session.length == 10
    close(session.run(ids[:, 10:13]), expected.run(ids[:, 10:13]))


def test_an_error_of_the_device_is_raised(session: Any, ids: Any, device: Any) -> None:
    device.cuda.broken = True
    with pytest.raises(CheckFailed, match="cudaErrorIllegalAddress"):
        session.run(ids[:, :4])
    device.cuda.broken = False


def test_a_closed_session_says_so(session: Any, ids: Any) -> None:
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(ids[:, :2])


def test_too_little_memory_says_how_much(graph: ExportedGraph, tiny: Any, device: Any) -> None:
    device.cuda.capacity = 100_000
    prefix = tiny.prefix if graph.contract.prefix_in_cache else None
    with pytest.raises(CheckFailed, match="MiB of device memory cannot be allocated") as caught:
        TensorRtSession(plan_of(graph), tiny.graph.contract, "tensorrt_rtx", prefix)
    assert "--max-context" in caught.value.hint
    assert not device.cuda.memory
    assert not device.cuda.streams


def test_a_context_may_be_as_long_as_the_plan_says_and_no_longer(session: Any, expected: Any, ids: Any) -> None:
    long = np.tile(ids, (1, 2))[:, :60]
    close(session.run(long), expected.run(long))
    with pytest.raises(UsageError, match="a context of 61 tokens"):
        session.run(long[:, :1])
    session.truncate(59)
    expected.truncate(59)
    close(session.run(long[:, :1]), expected.run(long[:, :1]))


def test_a_plan_of_another_graph_is_refused(graph: ExportedGraph, tiny: Any, device: Any) -> None:
    other = replace(tiny.graph.contract, num_layers=3)
    with pytest.raises(UntrustedArtifact, match="not of this bundle's graph"):
        TensorRtSession(plan_of(graph), other, "tensorrt_rtx", tiny.prefix)
    with pytest.raises(CheckFailed, match="refuses the plan"):
        TensorRtSession(b"\x00", tiny.graph.contract, "tensorrt_rtx", tiny.prefix)
    assert not device.cuda.streams, "a refused plan leaves a stream behind"


def test_the_device_memory_of_a_session_is_what_the_driver_counts(session: Any, device: FakeTensorRt) -> None:
    assert session.device_bytes == device.cuda.used > 0


def test_the_contract_takes_the_plans_own_type(session: Any, graph: ExportedGraph) -> None:
    # And no more positions than the plan has room for: 60 tokens and the prefix.
    assert session.contract == replace(graph.contract, max_positions=60 + graph.contract.prefix_length)
    assert isinstance(session.contract, GraphContract)


@pytest.mark.parametrize("tiny", ["baked", "cache"], indirect=True)
def test_a_plan_in_bfloat16_keeps_its_cache_so(device: FakeTensorRt, tiny: Any, ids: Any, tmp_path: Path) -> None:
    loaded, cached = tiny.loaded, tiny.graph.contract.prefix_in_cache
    given = loaded.spec, loaded.weights, Quantization(tiny.prefix, QuantScheme())
    form = GraphForm(quantized=False, prefix="cache" if cached else "baked")
    plan = plan_of(export_graph(*given, replace(form, dtype="bfloat16"), tmp_path))
    expected = open_session(export_graph(*given, form, tmp_path, name="float"), threads=1)
    with TensorRtSession(plan, tiny.graph.contract, "tensorrt_rtx", tiny.prefix if cached else None) as session:
        assert session.contract.dtype == "bfloat16"
        for begin, end in ((0, 12), (12, 13), (13, 14)):
            found, wanted = (s.run(ids[:, begin:end], need_logits="all") for s in (session, expected))
            # 8 bits in every layer: far from a wrong prefix, which moves the logits by their own size.
            np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1 * np.abs(wanted).max())
        session.truncate(12)
        expected.truncate(12)
        found, wanted = (s.run(ids[:, 20:21]) for s in (session, expected))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1 * np.abs(wanted).max())
