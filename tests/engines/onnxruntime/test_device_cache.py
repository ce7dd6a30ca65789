"""A cache bound to a device gives the logits of the plain path and never visits the host. The device is the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from cushion_deploy.core.session import HeldCache, RowSlice
from cushion_deploy.engines.onnxruntime.cache_graphs import TYPES, gather_graph, slice_graph
from cushion_deploy.engines.onnxruntime.device_cache import DeviceCache
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from cushion_deploy.engines.onnxruntime.settings import CPU, CUDA, TENSORRT
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.rows import BatchedRows

BOUND = replace(CPU, device="cpu")
"""The bound path of the GPU providers, with the only device that every machine has."""


@pytest.fixture
def bound(tiny: Any) -> OnnxRuntimeSession:
    """Return a session whose cache is bound to a device."""
    return tiny.session(provider=BOUND, chunk=16)


def test_the_gpu_providers_take_the_bound_path() -> None:
    assert CUDA.device == "cuda"
    assert CUDA.chain == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert CPU.device == "", "the default engine keeps its own, faster path"


def test_logits_are_those_of_transformers_and_of_the_plain_path(tiny: Any, bound: Any, ids: Any) -> None:
    plain = tiny.session(chunk=16)
    found = bound.run(ids[:, :30], need_logits="all")
    np.testing.assert_allclose(found, tiny.loaded.logits(ids, tiny.prefix)[:, :30], atol=2e-4)
    np.testing.assert_array_equal(found, plain.run(ids[:, :30], need_logits="all"))
    for i in range(30, 40):
        np.testing.assert_array_equal(bound.run(ids[:, i : i + 1]), plain.run(ids[:, i : i + 1]))
    assert bound.length == plain.length == 40


def test_no_key_and_no_value_is_copied_to_the_host(
    tiny: Any, bound: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    written: list[tuple[int, ...]] = []
    real, made = onnxruntime.OrtValue.numpy, onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda self: read.append(tuple(self.shape())) or real(self))
    note = staticmethod(lambda array, *more: written.append(array.shape) or made(array, *more))
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", note)
    bound.run(ids[:, :20], need_logits="none")
    first, parts = len(written), 2 * tiny.graph.contract.num_layers
    assert sum(len(shape) == 4 for shape in written) == parts, "the initial cache comes from the host, once"
    bound.run(ids[:, 20:21])
    bound.truncate(18)
    bound.run(ids[:, 18:30])
    assert all(len(shape) < 4 for shape in written[first:])
    assert [len(shape) for shape in read] == [3, 3], "logits, and nothing else"


def test_a_truncated_cache_is_one_that_never_held_more(tiny: Any, bound: Any, ids: Any) -> None:
    plain = tiny.session(chunk=16)
    bound.run(ids, need_logits="none")
    bound.truncate(25)
    plain.run(ids[:, :25], need_logits="none")
    assert bound.length == 25
    np.testing.assert_allclose(bound.run(ids[:, 30:31]), plain.run(ids[:, 30:31]), rtol=1e-4, atol=1e-4)


def test_a_prompt_with_a_cached_beginning_computes_the_rest(tiny: Any, bound: Any, ids: Any) -> None:
    cache, prompt = PromptCache(bound), ids[0].tolist()
    cache.feed([*prompt[:20], 7])
    kept = cache.keep(prompt)
    assert kept == bound.length == 20
    expected = tiny.loaded.logits(ids, tiny.prefix)[0, -1]
    np.testing.assert_allclose(cache.feed(prompt[kept:]), expected, atol=2e-4)


def test_a_left_padded_batch_equals_its_rows(tiny: Any, bound: Any, ids: Any) -> None:
    rows = [ids[0, :12], ids[0, 20:25]]
    batch, mask = np.full((2, 12), 2), np.zeros((2, 12), dtype=np.int64)
    for i, row in enumerate(rows):
        batch[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    together = bound.run(batch, mask)
    for row, found in zip(rows, together, strict=True):
        expected = tiny.loaded.logits(row[None], tiny.prefix)[0, -1:]
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_caches_are_held_gathered_and_restored(tiny: Any, bound: Any, ids: Any) -> None:
    bound.run(ids[:, :10], need_logits="none")
    long = bound.hold()
    bound.run(ids[:, 20:25], need_logits="none")
    short = bound.hold()
    bound.restore(bound.gather([RowSlice(long, 0, 0, 10), RowSlice(short, 0, 0, 5)]))
    mask = np.ones((2, 11), dtype=np.int64)
    mask[1, :5] = 0
    both = bound.run(np.array([[9], [9]]), mask)
    for row, found in zip((ids[:, :10], ids[:, 20:25]), both, strict=True):
        expected = tiny.loaded.logits(np.append(row, [[9]], axis=1), tiny.prefix)[0, -1:]
        np.testing.assert_allclose(found, expected, atol=2e-4)
    bound.restore(long)
    expected = tiny.loaded.logits(np.append(ids[:, :10], [[9]], axis=1), tiny.prefix)[:, -1:]
    np.testing.assert_allclose(bound.run(np.array([[9]])), expected, atol=2e-4)


def test_rows_are_gathered_on_the_device(tiny: Any, bound: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joins and leaves of the server: no key and no value visits the host, and they are those of the plain path."""
    plain, slices = tiny.session(chunk=16), []
    for session in (bound, plain):
        session.run(np.concatenate([ids[:, :10], ids[:, 20:30]]), need_logits="none")
        pair = session.hold()
        session.run(ids[:, 30:37], need_logits="none")
        one = session.hold()
        slices.append(
            [
                RowSlice(c, *place)
                for c, place in ((one, (0, 2, 5)), (pair, (1, 0, 10)), (pair, (0, 3, 10)), (one, (0, 0, 7)))
            ]
        )
    kept = plain.gather(slices[1])  # an array of an OrtValue is a view of its memory
    expected = [value.numpy() for value in kept.values]

    def host(self: Any) -> None:
        raise AssertionError("a cache visited the host")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "numpy", host)
        found, alone = bound.gather(slices[0]), bound.gather(slices[0][1:2])
    assert (found.rows, found.length, alone.rows, alone.length) == (4, 10, 1, 10)
    assert found.nbytes == sum(value.numpy().nbytes for value in found.values)
    for i, array in enumerate(expected):
        np.testing.assert_array_equal(found.values[i].numpy(), array)
        np.testing.assert_array_equal(alone.values[i].numpy(), array[1:2])


def test_a_prefix_in_the_cache_stays_first() -> None:
    values = [np.random.default_rng(i).standard_normal((2, 3, 8, 4)).astype(np.float32) for i in range(2)]
    made = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in values]
    cache = HeldCache(tuple(made), 2, 6, 0)
    device = DeviceCache(None, BOUND, "tensor(float)")
    found = device.gather([RowSlice(cache, 1, 3, 6), RowSlice(cache, 0, 0, 5)], slots=2)
    for value, array in zip(found, values, strict=True):
        zeros = np.zeros((3, 2, 4), np.float32)
        np.testing.assert_array_equal(value.numpy()[0], np.concatenate([array[1, :, :2], zeros, array[1, :, 5:8]], 1))
        np.testing.assert_array_equal(value.numpy()[1], array[0, :, :7])


def test_graphs_that_copy_run_on_cuda_beside_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT would compile an engine for every shape of a slice."""
    asked: list[list[str]] = []

    def loaded(graph: bytes, options: Any, providers: list[str]) -> None:
        asked.append(providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", loaded)
    for offered, expected in ((TENSORRT.chain, TENSORRT.chain), ([*TENSORRT.chain, CUDA.name], CUDA.chain)):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda offered=offered: offered)
        DeviceCache(None, TENSORRT, "tensor(float)")
        assert asked.pop() == expected
    DeviceCache(None, BOUND, "tensor(float)")
    assert asked == [CPU.chain]


def test_a_bfloat16_cache_is_refused_in_words(tiny: Any) -> None:
    contract = replace(tiny.graph.contract, dtype="bfloat16")
    with pytest.raises(UsageError, match="cache of bfloat16, which ONNX Runtime cannot exchange") as caught:
        OnnxRuntimeSession(tiny.graph.path, contract)
    assert "--plan-dtype bf16" in caught.value.hint


def test_the_rows_of_the_server_run_on_it(tiny: Any, bound: Any, ids: Any) -> None:
    rows = BatchedRows(bound, 2, KvPool(1 << 20))
    texts = {0: ids[0, :12].tolist(), 1: ids[0, 20:25].tolist()}
    for key, text in texts.items():
        rows.open(key, text)
        rows.prefill(key, text, last=True)
    for token in (9, 11):
        for key, logits in rows.decode(dict.fromkeys(texts, token)).items():
            texts[key].append(token)
            expected = tiny.loaded.logits(np.array([texts[key]]), tiny.prefix)[0, -1]
            np.testing.assert_allclose(logits, expected, atol=2e-4)
    rows.close(0)
    rows.open(2, texts[0])
    assert rows.prefill(2, [*texts[0], 5], last=True) is not None, "continues from the pool"


def test_a_step_that_fails_leaves_the_cache(tiny: Any, bound: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound.run(ids[:, :5], need_logits="none")
    with monkeypatch.context() as patch:
        patch.setattr(bound._device, "step", lambda names, feed: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bound.run(ids[:, 5:])
    assert bound.length == 5
    expected = tiny.loaded.logits(ids, tiny.prefix)[:, -1:]
    np.testing.assert_allclose(bound.run(ids[:, 5:]), expected, atol=2e-4)


@pytest.mark.parametrize(("kind", "dtype"), list(zip(TYPES, (np.float32, np.float16, np.int8), strict=True)))
def test_the_graph_that_cuts_is_a_slice(kind: str, dtype: Any) -> None:
    model = onnx.load_from_string(slice_graph(kind, rank=4, axis=2))
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).integers(-9, 9, (2, 3, 5, 4)).astype(dtype)
    feed = {"x": x, "start": np.array([1]), "end": np.array([4])}
    for run in (
        ReferenceEvaluator(model).run,
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run,
    ):
        (found,) = run(None, feed)
        np.testing.assert_array_equal(found, x[:, :, 1:4])


@pytest.mark.parametrize(("kind", "dtype"), list(zip(TYPES, (np.float32, np.float16, np.int8), strict=True)))
def test_the_graph_that_gathers_is_slices_and_zeros(kind: str, dtype: Any) -> None:
    model = onnx.load_from_string(gather_graph(kind, 2))
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).integers(-9, 9, (2, 3, 5, 4)).astype(dtype)
    feed = {"x0": x, "x1": x, "padding0": np.array([1, 3, 2, 4]), "padding1": np.array([1, 3, 0, 4])}
    for i, (first, kept, begin, end) in enumerate([((0, 0), (1, 1), (0, 3), (1, 4)), ((1, 0), (2, 1), (1, 1), (2, 4))]):
        feed |= {f"first{i}": np.array(first), f"kept{i}": np.array(kept)}
        feed |= {f"begin{i}": np.array(begin), f"end{i}": np.array(end)}
    zeros = np.zeros((3, 2, 4), dtype)
    expected = np.stack([np.concatenate([x[0, :, :1], zeros, x[0, :, 3:4]], axis=1), x[1, :, :4]])
    for run in (
        ReferenceEvaluator(model).run,
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run,
    ):
        (found,) = run(None, feed)
        np.testing.assert_array_equal(found, expected)
