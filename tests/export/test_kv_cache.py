"""The graph with an INT8 cache is transformers with a simulated one: the same codes, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales, kv_site
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.export.folder import export_graph
from cushion_deploy.export.rules import RULES, check_graph
from cushion_deploy.modeling.simulate import quantized_cache

TOKENS = (7, 1, 100)
FIRST, VALUE = kv_site(0, "value"), kv_site(1, "value")
CACHE = {kv_site(i, part) for i in range(2) for part in ("key", "value")}
Edit = Callable[[onnx.ModelProto], None]


def scales_of(model: Any, prefix: Prefix, granularity: str = "per-head", *, with_prefix: bool = False) -> KvScales:
    shape = (model.spec.num_layers, model.spec.num_kv_heads)
    keys = (0.03 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)).astype(np.float32)
    if granularity == "per-tensor":
        keys[:] = keys[:, :1]
    parents = (granularity, "max", Lineage(model.spec.weights_digest, prefix.digest, text="c"), 1)
    return KvScales(keys, (keys / 2).astype(np.float32), *parents, with_prefix=with_prefix)


@pytest.fixture
def export(make_model, tmp_path: Path):
    """Return a function that exports the random model with float linears and an INT8 cache."""

    def make(granularity: str = "per-head", *, cached: bool = False, **options: Any) -> tuple[ExportedGraph, KvScales]:
        model = make_model()
        prefix = model.compute_prefix(TOKENS)
        kv = scales_of(model, prefix, granularity, with_prefix=cached)
        given = {"kv": kv, "prefix_in_cache": cached, **options}
        return export_graph(model.spec, model.weights, prefix, None, QuantScheme(), tmp_path, **given), kv

    return make


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 199, (1, 20))


def simulated_logits(model: Any, kv: KvScales, row: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return logits and the keys and values of the row, layer by layer, of torch."""
    past = model.past(model.compute_prefix(TOKENS))
    with torch.inference_mode(), quantized_cache(model, kv):
        out = model.run(torch.from_numpy(row), past, keep_cache=True)
    states = [
        s[:, :, len(TOKENS) :].numpy() for layer in out.past_key_values.layers for s in (layer.keys, layer.values)
    ]
    return out.logits.numpy(), states


def begin(graph: ExportedGraph, kv: KvScales, model: Any) -> dict[str, np.ndarray]:
    """Return the first past: nothing, or the codes of the prefix as numpy rounds them."""
    prefix = model.compute_prefix(TOKENS)
    past = {}
    for i in range(model.spec.num_layers):
        for part, floats, steps in (("key", prefix.keys, kv.keys), ("value", prefix.values, kv.values)):
            codes = np.clip(np.rint(floats[i] / steps[i][:, None, None]), -128, 127).astype(np.int8)
            past[f"past_key_values.{i}.{part}"] = codes[None, :, : graph.contract.prefix_slots]
    return past


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
@pytest.mark.parametrize("cached", [False, True], ids=["baked", "cache"])
def test_codes_and_logits_are_those_of_torch_at_once_and_in_pieces(
    granularity: str, cached: bool, export, make_model, runner, ids
) -> None:
    graph, kv = export(granularity, cached=cached)
    model, session = make_model(), runner(graph.path)
    expected, states = simulated_logits(model, kv, ids)
    past = begin(graph, kv, model)
    slots = graph.contract.prefix_slots
    # Positions and mask of the runner count what lies in the past.
    logits, present = session(ids, past)
    assert np.abs(logits - expected).max() <= 1e-4
    for i, state in enumerate(states):
        codes = present[f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"]
        assert codes.dtype == np.int8
        steps = (kv.keys, kv.values)[i % 2][i // 2][:, None, None]
        np.testing.assert_array_equal(codes[:, :, slots:], np.rint(state / steps))
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 20)):
        found, past = session(ids[:, start:end], past)
        parts.append(found)
    assert np.abs(np.concatenate(parts, axis=1) - expected).max() <= 1e-4


def test_left_padding_changes_nothing(export, make_model, runner, ids) -> None:
    graph, kv = export()
    batch = np.stack([ids[0], np.r_[[0] * 6, ids[0, 6:]]])
    mask = (np.arange(20) >= np.array([[0], [6]])).astype(np.int64)
    logits, _ = runner(graph.path)(batch, mask=mask)
    for row, start in enumerate((0, 6)):
        expected, _ = simulated_logits(make_model(), kv, ids[:, start:])
        assert np.abs(logits[row, start:] - expected[0]).max() <= 1e-4


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
def test_float16_is_close_and_quantizes_in_float32(granularity: str, export, make_model, runner, ids) -> None:
    graph, kv = export(granularity, dtype="float16")
    expected, _ = simulated_logits(make_model(), kv, ids)
    logits, present = runner(graph.path)(ids)
    assert {codes.dtype for codes in present.values()} == {np.dtype(np.int8)}
    # A code that half moves over a tie moves a logit too.
    assert np.abs(logits - expected).max() <= 0.02 * np.abs(expected).max()
    stored = {t.name: t.data_type for t in onnx.load(graph.path).graph.initializer}
    assert {stored[f"{site}.scale"] for site in CACHE} == {TensorProto.FLOAT}


@pytest.mark.parametrize("opset", [17, 19, 21, 22])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_checker_accepts_it_and_its_contract_says_int8(opset: int, dtype: str, export) -> None:
    graph, _ = export(opset=opset, dtype=dtype)
    onnx.checker.check_model(graph.path, full_check=True)
    written = onnx.load(graph.path, load_external_data=False).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*written.input, *written.output)}
    caches = [kind for name, kind in types.items() if name.startswith(("past", "present"))]
    assert caches == [TensorProto.INT8] * 8
    assert graph.contract.cache_dtype == "int8"
    assert graph.contract.dtype == dtype
    assert [file.name for file in graph.files] == ["model.onnx", "model.onnx.data", "kv_scales.json"]
    assert ExportedGraph.from_json(graph.to_json(), graph.path.parent) == graph


def test_a_floating_point_cache_leaves_no_trace(export_float, make_model) -> None:
    graph = export_float(make_model(), TOKENS)
    assert not graph.path.with_name("kv_scales.json").exists()
    assert "quantized_cache" not in graph.to_json()["contract"]
    assert graph.lineage.kv_scales == ""
    assert graph.contract.cache_dtype == "float32"


def test_scales_of_something_else_are_refused(make_model, tmp_path: Path) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    good = scales_of(model, prefix)
    for kv, options, words in (
        (replace(good, lineage=replace(good.lineage, model="other")), {}, "another model"),
        (replace(good, keys=good.keys[:1], values=good.values[:1]), {}, "another model"),
        (replace(good, lineage=replace(good.lineage, prefix="other")), {}, "another prefix or smoothing"),
        (replace(good, lineage=replace(good.lineage, smoothing="other")), {}, "another prefix or smoothing"),
        (replace(good, with_prefix=True), {}, "for a prefix in the cache, and it is inside the graph"),
        (good, {"prefix_in_cache": True}, "for a prefix inside the graph, and it is in the cache"),
    ):
        with pytest.raises(UsageError, match=words):
            export_graph(model.spec, model.weights, prefix, None, QuantScheme(), tmp_path, kv=kv, **options)
        assert not list(tmp_path.iterdir()), "nothing may be written"


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if name in n.input)


def tensor(name: str, array: np.ndarray) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        found = next((t for t in model.graph.initializer if t.name == name), None) or model.graph.initializer.add()
        found.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return edit


def other_scale(model: onnx.ModelProto) -> None:
    tensor("other", np.float32([0.1, 0.2]))(model)
    reader(model, "present.0.value").input[1] = "other"


def other_axis(model: onnx.ModelProto) -> None:
    reader(model, "present.0.value").attribute[0].i = 3


def read_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["present.0.value"], ["cast"], "cast", to=TensorProto.FLOAT))


def not_read(model: onnx.ModelProto) -> None:
    dq = reader(model, "present.0.value")
    dq.input[0] = "past_key_values.0.value"


def past_of_another_layer(model: onnx.ModelProto) -> None:
    node(model, "present.0.value").input[0] = "past_key_values.1.value"


def float_past(model: onnx.ModelProto) -> None:
    value = next(v for v in model.graph.input if v.name == "past_key_values.0.value")
    value.type.tensor_type.elem_type = TensorProto.FLOAT


def read_before_it_is_turned(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["present.0.key"], ["cast"], "cast", to=TensorProto.FLOAT))


def another_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(f"{FIRST}.codes", TensorProto.INT8, None))


BROKEN: list[tuple[str, str, Edit]] = [
    ("cache-codes", "has another scale than", other_scale),
    ("cache-codes", "has a scale along another axis", other_axis),
    ("cache-codes", "has a scale along another axis", tensor(f"{FIRST}.scale", np.ones(3, np.float32))),
    ("cache-codes", "has a scale of type FLOAT16", tensor(f"{FIRST}.scale", np.ones(2, np.float16))),
    ("cache-codes", "has a scale of 0.0", tensor(f"{FIRST}.scale", np.zeros(2, np.float32))),
    ("cache-codes", "is read by DequantizeLinear, Cast", read_twice),
    ("cache-codes", "is read by nothing", not_read),
    ("cache-codes", "is not joined to its past", past_of_another_layer),
    ("cache-codes", "keeps past_key_values.0.value as FLOAT", float_past),
    ("cache-codes", f"output {FIRST}.codes: is int8", another_output),
    ("cache-codes", "layers.0.kv.key: is read by Transpose, Cast", read_before_it_is_turned),
    ("float-attention", "", not_read),
]


def check(path: Path, cache: set[Site], damage: Edit | None = None) -> list[str]:
    model = onnx.load(path)
    if damage:
        damage(model)
    return check_graph(ir.serde.deserialize_model(model), set(), cache)


def test_a_whole_graph_obeys_every_rule(export) -> None:
    graph, _ = export()
    assert list(graph.rules) == check(graph.path, CACHE) == list(RULES)


@pytest.mark.parametrize(
    ("rule", "words", "damage"), BROKEN, ids=[f"{d.__name__}-{i}" for i, (*_, d) in enumerate(BROKEN)]
)
def test_a_damaged_cache_is_told(rule: str, words: str, damage: Edit, export) -> None:
    graph, _ = export()
    with pytest.raises(CheckFailed) as caught:
        check(graph.path, CACHE, damage)
    assert [line for line in caught.value.message.splitlines() if line.startswith(f"[{rule}]") and words in line]


def test_a_cache_that_nobody_asked_for_and_one_that_is_missing_are_told(export, export_float, make_model) -> None:
    graph, _ = export()
    with pytest.raises(CheckFailed) as caught:
        check(graph.path, set())
    for rule in ("sites-exactly", "cache-codes", "float-attention"):
        assert f"[{rule}]" in caught.value.message
    with pytest.raises(CheckFailed) as caught:
        check(export_float(make_model(), TOKENS).path, CACHE)
    assert f"[sites-exactly] Site {VALUE}: has no QuantizeLinear" in caught.value.message
    assert f"[cache-codes] {VALUE}: is not joined" in caught.value.message
