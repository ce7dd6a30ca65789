"""Plans with a static cache on a device that checks every call: updated in place, decoded as one CUDA graph."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_gpu import Context, FakeTensorRt
from fake_plans import close, plan_of

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.tensorrt.cuda import Cuda
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.errors import CheckFailed, UntrustedArtifact, UsageError
from cushion_deploy.export.write import export_graph

pytestmark = pytest.mark.parametrize("tiny", ["cache"], indirect=True)
CONTEXT = 60
LIMITS = CompileOptions(max_batch=3, max_context=2048, max_prefill=8)


@pytest.fixture(scope="module", params=["float16", "float32"])
def graphs(tiny: Any, request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedGraph, ExportedGraph]:
    """Return the tiny model's graph with a static cache, and with one that grows."""
    loaded, folder = tiny.loaded, tmp_path_factory.mktemp("static")
    given = loaded.spec, loaded.weights, Quantization(tiny.prefix, QuantScheme())
    growing = GraphForm(dtype=request.param, quantized=False, prefix="cache")
    static = replace(growing, cache="static", capacity=CONTEXT + tiny.prefix.length)
    return (
        export_graph(*given, static, folder, name="static"),
        export_graph(*given, growing, folder, name="growing"),
    )


@pytest.fixture
def session(device: FakeTensorRt, graphs: Any, tiny: Any) -> Any:
    """Return a session, opened by the contract of the bundle's own graph; closed with nothing left behind."""
    with TensorRtSession(plan_of(graphs[0], LIMITS), tiny.graph.contract, "tensorrt_rtx", tiny.prefix) as opened:
        yield opened
    cuda = device.cuda
    assert [*cuda.memory, *cuda.streams, *cuda.graphs, *cuda.executables] == []


@pytest.fixture
def expected(graphs: Any) -> Any:
    """Return a session of the growing graph in ONNX Runtime."""
    return open_session(graphs[1], threads=1)


def decode(session: Any, expected: Any, ids: Any, begin: int, end: int, mask: Any = None) -> None:
    """Feed single tokens to both and compare."""
    for i in range(begin, end):
        kept = None if mask is None else mask[:, : session.length + 1]
        close(session.run(ids[:, i : i + 1], kept), expected.run(ids[:, i : i + 1], kept))


def test_pieces_of_a_prompt_and_single_tokens(session: Any, expected: Any, ids: Any, device: Any) -> None:
    close(session.run(ids[:, :20], need_logits="all"), expected.run(ids[:, :20], need_logits="all"))
    assert device.executed == [0, 0, 0]  # pieces of 8, 8 and 4 in the prefill profile
    decode(session, expected, ids, 20, 26)
    assert device.executed[3:] == [1] * 6
    assert session.run(ids[:, 26:30], need_logits="none") is None
    expected.run(ids[:, 26:30], need_logits="none")
    decode(session, expected, ids, 30, 33)
    assert session.length == expected.length == 33


def test_decoding_is_recorded_once_and_launched_from_then_on(
    session: Any, expected: Any, ids: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued, bound = [], []
    run, bind = Context.execute_async_v3, Context.set_tensor_address
    monkeypatch.setattr(Context, "execute_async_v3", lambda s, stream: queued.append(s.profile) or run(s, stream))
    monkeypatch.setattr(Context, "set_tensor_address", lambda s, n, a: bound.append(n) or bind(s, n, a))
    session.run(ids[:, :5], need_logits="none")
    expected.run(ids[:, :5], need_logits="none")
    decode(session, expected, ids, 5, 6)
    assert (device.cuda.recorded, device.cuda.launched) == (0, 0), "recorded before it ran"
    decode(session, expected, ids, 6, 7)
    bound.clear()
    decode(session, expected, ids, 7, 12)
    # Seven steps: one plain, one recorded, which runs nothing, and launched; then five launches.
    assert (device.cuda.recorded, device.cuda.launched) == (1, 6)
    assert queued == [0, 1, 1]
    assert bound == []
    assert not device.cuda.graphs, "the graph behind an executable one is not needed any more"


def test_a_prompt_between_decode_steps_leaves_the_recording_as_it_is(
    session: Any, expected: Any, ids: Any, device: Any
) -> None:
    for begin in (0, 12):
        close(session.run(ids[:, begin : begin + 8]), expected.run(ids[:, begin : begin + 8]))
        decode(session, expected, ids, begin + 8, begin + 12)
    session.reset()
    expected.reset()
    close(session.run(ids[:, :9]), expected.run(ids[:, :9]))  # a piece of 8, and one token
    decode(session, expected, ids, 9, 12)
    assert device.cuda.recorded == 1


def test_left_padded_batches_of_changing_size(session: Any, expected: Any, ids: Any, device: Any) -> None:
    for rows in (2, 1, 3, 2):
        session.reset()
        expected.reset()
        batch = ids[0, : rows * 10].reshape(rows, 10)
        mask = np.ones((rows, 16), dtype=np.int64)
        mask[-1, :4] = 0
        close(session.run(batch, mask[:, :10])[0], expected.run(batch, mask[:, :10])[0])
        decode(session, expected, batch, 0, 6, mask)
        with pytest.raises(UsageError, match=f"the cache has {rows}"):
            session.run(np.ones((4, 1), dtype=np.int64))
    assert device.cuda.recorded == 4
    assert len(device.cuda.executables) == 1, "recordings of another batch are given back"


def test_truncating_moves_nothing(session: Any, expected: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = np.concatenate([ids[:, :12], ids[:, 12:24]])
    session.run(batch, need_logits="none")
    monkeypatch.setattr(session._cuda, "copy_rows", lambda *_: pytest.fail("something was copied"))
    session.truncate(7)
    expected.run(batch[:, :7], need_logits="none")
    close(session.run(batch[:, :3], need_logits="all"), expected.run(batch[:, :3], need_logits="all"))
    session.truncate(0)
    expected.reset()
    close(session.run(ids[:, :5]), expected.run(ids[:, :5]))


@pytest.mark.parametrize("back", ["truncate", "reset", "fail"])
def test_what_a_text_without_numbers_has_left_behind_is_gone(
    back: str, session: Any, expected: Any, ids: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.run(ids[:, :10], need_logits="none")
    ran = Context.execute_async_v3

    def overflows(self: Any, stream: int) -> bool:
        done = ran(self, stream)
        # The step writes infinities into the slots of its tokens, as an overflow in half does.
        device.cuda.queue.append(lambda: poison(session, 10, 14))
        return done and back != "fail"

    with monkeypatch.context() as patch:
        patch.setattr(Context, "execute_async_v3", overflows)
        if back == "fail":
            with pytest.raises(CheckFailed):
                session.run(ids[:, 10:14])
        else:
            session.run(ids[:, 10:14], need_logits="none")
    if back == "truncate":
        session.truncate(10)
    if back == "reset":
        session.reset()
        session.run(ids[:, :10], need_logits="none")
    expected.run(ids[:, :10], need_logits="none")
    close(session.run(ids[:, 20:22]), expected.run(ids[:, 20:22]))


def poison(session: Any, begin: int, end: int) -> None:
    """Write infinity into slots of the first row of every cache."""
    c = session.contract
    kind = np.dtype(c.dtype)
    token = c.head_dim * kind.itemsize
    for buffer in session._caches._buffers:
        start, size = (begin + c.prefix_slots) * token, (end - begin) * token
        infinite = np.full(size // kind.itemsize, np.inf, kind).tobytes()
        session._cuda._api.find(buffer.at(start + size) + start, size)[:] = infinite


def test_a_call_that_fails_leaves_the_cache_as_it_was(
    session: Any, expected: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    close(session.run(ids[:, :10]), expected.run(ids[:, :10]))
    decode(session, expected, ids, 10, 13)
    real, calls = Context.execute_async_v3, []

    def fails_at_the_second(self: Any, stream: int) -> bool:
        calls.append(stream)
        return len(calls) != 2 and real(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "execute_async_v3", fails_at_the_second)
        with pytest.raises(CheckFailed, match="refuses to run in profile 'prefill'"):
            session.run(ids[:, 13:28])
    assert session.length == 13
    decode(session, expected, ids, 13, 16)


@pytest.mark.parametrize("records", ["no", "fails"])
def test_a_plan_that_cannot_be_recorded_decodes_plainly_after_one_warning(
    records: str, session: Any, expected: Any, ids: Any, device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    device.records = records
    session.run(ids[:, :5], need_logits="none")
    expected.run(ids[:, :5], need_logits="none")
    with caplog.at_level(logging.WARNING):
        decode(session, expected, ids, 5, 10)
        session.truncate(8)
        expected.truncate(8)
        decode(session, expected, ids, 10, 12)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "decoding without a CUDA graph, which is slower"
    ]
    assert (device.cuda.recorded, device.cuda.launched) == (0, 0)


def test_a_launch_on_memory_that_is_gone_is_found(session: Any, ids: Any) -> None:
    for i in range(3):
        session.run(ids[:, i : i + 1], need_logits="none")
    session._inputs["position_ids"].free()
    with pytest.raises(AssertionError, match="illegal access"):
        session._cuda.launch(session._graph._graph)


def test_standard_tensorrt_has_fewer_calls(
    graphs: Any, tiny: Any, expected: Any, ids: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(device, "DynamicShapesKernelSpecializationStrategy")
    monkeypatch.delattr(Context, "is_stream_capturable")
    with TensorRtSession(plan_of(graphs[0], LIMITS), tiny.graph.contract, "tensorrt", tiny.prefix) as session:
        decode(session, expected, ids, 0, 4)
    assert device.cuda.recorded == 1


def test_only_decoding_waits_for_kernels_of_its_own_shape(session: Any, device: Any) -> None:
    eager = device.DynamicShapesKernelSpecializationStrategy.EAGER
    strategies = {
        name: getattr(session._contexts[index].wanted, "dynamic_shapes_kernel_specialization_strategy", None)
        for index, name in enumerate(("prefill", "decode"))
    }
    assert strategies == {"prefill": None, "decode": eager}


def test_contexts_share_their_scratch(session: Any) -> None:
    first, second = session._contexts.values()
    assert first.scratch == second.scratch


def test_a_context_may_be_as_long_as_the_plan_says_and_no_longer(session: Any, expected: Any, ids: Any) -> None:
    long = np.tile(ids, (1, 2))[:, :CONTEXT]
    close(session.run(long), expected.run(long))
    with pytest.raises(UsageError, match=f"a context of {CONTEXT + 1} tokens is longer than the {CONTEXT}"):
        session.run(long[:, :1])
    session.truncate(CONTEXT - 1)
    expected.truncate(CONTEXT - 1)
    close(session.run(long[:, :1]), expected.run(long[:, :1]))


def test_the_contract_takes_the_plans_own_type_and_capacity(session: Any, graphs: Any) -> None:
    slots = CONTEXT + graphs[0].contract.prefix_length
    assert session.contract == replace(graphs[0].contract, max_positions=slots)
    assert session.contract.cache_capacity == slots


def test_a_static_plan_of_another_graph_is_refused(graphs: Any, tiny: Any, device: Any) -> None:
    baked = replace(tiny.graph.contract, prefix_in_cache=False)
    with pytest.raises(UntrustedArtifact, match="not of this bundle's graph"):
        TensorRtSession(plan_of(graphs[0], LIMITS), baked, "tensorrt_rtx")
    with pytest.raises(UsageError, match="every cache begins with a prefix"):
        TensorRtSession(plan_of(graphs[0], LIMITS), tiny.graph.contract, "tensorrt_rtx")
    assert not device.cuda.memory
    assert not device.cuda.streams


def test_a_plan_that_copies_its_cache_is_refused(
    graphs: Any, tiny: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_gpu.Engine.get_aliased_input_tensor", lambda *_: None)
    with pytest.raises(UntrustedArtifact, match=r"does not update past_key_values\.0\.key in place"):
        TensorRtSession(plan_of(graphs[0], LIMITS), tiny.graph.contract, "tensorrt_rtx", tiny.prefix)


def test_a_prefix_that_did_not_arrive_is_sent_again(
    session: Any, expected: Any, ids: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Cuda.upload_rows

    def interrupted(self: Cuda, *given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "upload_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(ids[:, :6])
    assert Cuda.upload_rows is uploads
    close(session.run(ids[:, :6]), expected.run(ids[:, :6]))
