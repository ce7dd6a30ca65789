"""The float graph is the model: equal to transformers for every option, and true to its contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "grouped-query, untied": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head size of its own": {"head_dim": 24},
    "linear rope scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 rope scaling": {"rope_parameters": LLAMA3},
    "another rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "another norm epsilon": {"rms_norm_eps": 0.1},
}
PREFIXES = [(), (7,), (7, 1, 100)]
CLOSE = 1e-4


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 199, (1, 20))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_are_those_of_transformers_at_once_and_through_the_cache(
    options: dict[str, Any], make_model, export_float, transformers_logits, runner, ids
) -> None:
    model = make_model(**options)
    graph = runner(export_float(model, (7, 1, 100)).path)
    expected = transformers_logits(model, (7, 1, 100), ids[0].tolist())[None]
    assert np.ptp(expected, axis=-1).min() > 0.5, "the model must have something to say"
    assert largest(graph(ids)[0], expected) <= CLOSE
    parts, past = [], None
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 20)):
        logits, past = graph(ids[:, begin:end], past)
        parts.append(logits)
    assert largest(np.concatenate(parts, axis=1), expected) <= CLOSE


@pytest.mark.parametrize("tokens", PREFIXES, ids=len)
def test_left_padding_in_a_batch_changes_nothing(
    tokens: tuple[int, ...], make_model, export_float, transformers_logits, runner, ids
) -> None:
    model = make_model()
    graph = runner(export_float(model, tokens).path)
    rows = [ids[0].tolist(), ids[0, 6:].tolist()]
    batch = np.stack([ids[0], np.r_[[0] * 6, ids[0, 6:]]])
    mask = (np.arange(20) >= np.array([[0], [6]])).astype(np.int64)
    expected = [transformers_logits(model, tokens, row) for row in rows]
    logits, _ = graph(batch, mask=mask)
    assert largest(logits[0], expected[0]) <= CLOSE
    assert largest(logits[1, 6:], expected[1]) <= CLOSE
    _, past = graph(batch[:, :12], mask=mask[:, :12])
    logits, _ = graph(batch[:, 12:], past, mask)
    assert largest(logits[0], expected[0][12:]) <= CLOSE
    assert largest(logits[1], expected[1][6:]) <= CLOSE


@pytest.mark.parametrize("tokens", PREFIXES, ids=len)
def test_present_is_the_cache_of_transformers_without_the_prefix(
    tokens: tuple[int, ...], make_model, export_float, runner, ids
) -> None:
    model = make_model()
    _, past = runner(export_float(model, tokens).path)(ids)
    with torch.inference_mode():
        cache = model.module(input_ids=torch.tensor([[*tokens, *ids[0].tolist()]])).past_key_values
    for i, layer in enumerate(cache.layers):
        assert largest(past[f"past_key_values.{i}.key"], layer.keys[:, :, len(tokens) :].numpy()) <= CLOSE
        assert largest(past[f"past_key_values.{i}.value"], layer.values[:, :, len(tokens) :].numpy()) <= CLOSE


def test_the_prefix_matters(make_model, export_float, runner, ids) -> None:
    model = make_model()
    without, _ = runner(export_float(model).path)(ids)
    behind, _ = runner(export_float(model, (7,)).path)(ids)
    assert largest(without, behind) > 100 * CLOSE


def test_positions_are_those_of_the_caller(make_model, export_float, runner, ids) -> None:
    model = make_model()
    graph = runner(export_float(model, (7, 1, 100)).path)
    positions = np.arange(80, 100, dtype=np.int64)[None]
    _, past = graph(ids, position_ids=positions)
    with torch.inference_mode():
        # The keys of the first layer see nothing of the context, so the prefix itself may be left out here.
        cache = model.module(
            input_ids=torch.from_numpy(ids), position_ids=torch.from_numpy(positions + 3)
        ).past_key_values
    assert largest(past["past_key_values.0.key"], cache.layers[0].keys.numpy()) <= CLOSE


@pytest.mark.parametrize("opset", range(17, 23))
def test_every_opset_computes_the_same(opset: int, make_model, export_float, transformers_logits, runner, ids) -> None:
    model = make_model(tie_word_embeddings=True)
    exported = export_float(model, (7,), opset=opset)
    written = onnx.load(exported.path, load_external_data=False)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", opset)]
    assert exported.opset == opset
    expected = transformers_logits(model, (7,), ids[0].tolist())[None]
    assert largest(runner(exported.path)(ids)[0], expected) <= CLOSE


@pytest.mark.parametrize("tied", [False, True])
def test_float16_is_close(tied: bool, make_model, export_float, transformers_logits, runner, ids) -> None:
    model = make_model(tie_word_embeddings=tied)
    graph = runner(export_float(model, (7, 1, 100), dtype="float16").path)
    rows = np.stack([ids[0], np.r_[[0] * 6, ids[0, 6:]]])
    mask = (np.arange(20) >= np.array([[0], [6]])).astype(np.int64)
    logits, past = graph(rows, mask=mask)
    assert logits.dtype == np.float32
    assert {v.dtype for v in past.values()} == {np.dtype(np.float16)}
    for row, begin in enumerate((0, 6)):
        expected = transformers_logits(model, (7, 1, 100), ids[0, begin:].tolist())
        # Half has 11 bits: 2^-11 of the largest logit for the last rounding, and some for the layers before.
        assert largest(logits[row, begin:], expected) <= 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "element"), [("float32", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16)])
def test_inputs_and_outputs_are_exactly_the_contract(dtype: str, element: int, make_model, export_float) -> None:
    exported = export_float(make_model(), (7, 1, 100), dtype=dtype)
    graph = onnx.load(exported.path, load_external_data=False).graph
    overridable = {t.name for t in graph.initializer}

    def described(values: Any) -> list[tuple[str, int, list[str | int]]]:
        return [
            (
                v.name,
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
            if v.name not in overridable
        ]

    whole, past = TensorProto.INT64, ["batch", 2, "past", 16]
    parts = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert described(graph.input) == [
        ("input_ids", whole, ["batch", "sequence"]),
        ("attention_mask", whole, ["batch", "total"]),
        ("position_ids", whole, ["batch", "sequence"]),
        *((f"past_key_values.{p}", element, past) for p in parts),
    ]
    names = [name for name, *_ in described(graph.output)]
    assert names == ["logits", *(f"present.{p}" for p in parts)]
    types = {name: (kind, shape) for name, kind, shape in described(graph.output)}
    assert types["logits"][0] == TensorProto.FLOAT
    assert types["logits"][1][0] == "batch"
    assert types["logits"][1][2] == 199
    assert all(types[f"present.{p}"] == (element, ["batch", 2, "total", 16]) for p in parts)
    c = exported.contract
    assert (c.num_layers, c.num_kv_heads, c.head_dim, c.vocab_size, c.max_positions, c.dtype, c.prefix_length) == (
        2, 2, 16, 199, 128, dtype, 3,
    )  # fmt: skip


def test_a_graph_without_prefix_has_no_trace_of_one(make_model, export_float) -> None:
    graph = onnx.load(export_float(make_model()).path, load_external_data=False).graph
    assert not [t.name for t in graph.initializer if t.name.startswith("prefix")]
    assert not [n.name for n in graph.node if n.op_type == "Expand"]


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_logits_start_gives_the_rows_from_there_on(options, make_model, export_float, runner, ids) -> None:
    graph = runner(export_float(make_model(**options), (7,)).path)
    batch = np.concatenate([ids, ids[:, ::-1]])
    everything, past = graph(batch)
    assert everything.shape == (2, 20, 199)
    for start in (0, 1, 13, 19, 20):
        rows, other = graph(batch, logits_start=np.array([start], np.int64))
        assert rows.shape == (2, 20 - start, 199)
        np.testing.assert_allclose(rows, everything[:, start:], atol=1e-5)
        assert all(np.array_equal(past[name], other[name]) for name in past)


def test_logits_start_is_optional_and_absent_from_float16(make_model, export_float, runner) -> None:
    single = export_float(make_model(), (7,))
    session = runner(single.path).session
    assert [(i.name, i.type, i.shape) for i in session.get_overridable_initializers()] == [
        ("logits_start", "tensor(int64)", [1])
    ]
    assert "logits_start" not in [i.name for i in session.get_inputs()]
    half = runner(export_float(make_model(), (7,), dtype="float16").path).session
    assert half.get_overridable_initializers() == []
