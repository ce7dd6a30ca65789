"""The rule about INT8 caches, on an exported graph: whole it passes, broken in one way it names that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from cushion_deploy.core.kv_scales import kv_site
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.rules import RULES, check_graph

TOKENS = (7, 1, 100)
FIRST, VALUE = kv_site(0, "value"), kv_site(1, "value")
CACHE = {kv_site(i, part) for i in range(2) for part in ("key", "value")}
Edit = Callable[[onnx.ModelProto], None]


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


def read_before_it_is_transposed(model: onnx.ModelProto) -> None:
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
    ("cache-codes", "layers.0.kv.key: is read by Transpose, Cast", read_before_it_is_transposed),
    ("float-attention", "", not_read),
]


def check(path: Path, cache: set[Site], damage: Edit | None = None) -> dict[str, int]:
    model = onnx.load(path)
    if damage:
        damage(model)
    return check_graph(ir.serde.deserialize_model(model), set(), cache)


def test_a_whole_graph_obeys_every_rule(export_cached) -> None:
    graph, _ = export_cached()
    assert list(graph.rules) == list(check(graph.path, CACHE)) == list(RULES)


@pytest.mark.parametrize(
    ("rule", "words", "damage"), BROKEN, ids=[f"{d.__name__}-{i}" for i, (*_, d) in enumerate(BROKEN)]
)
def test_a_damaged_cache_is_reported(rule: str, words: str, damage: Edit, export_cached) -> None:
    graph, _ = export_cached()
    with pytest.raises(CheckFailed) as caught:
        check(graph.path, CACHE, damage)
    assert [line for line in caught.value.message.splitlines() if line.startswith(f"[{rule}]") and words in line]


def test_a_cache_that_nobody_asked_for_and_one_that_is_missing_are_reported(
    export_cached, export_float, make_model
) -> None:
    graph, _ = export_cached()
    with pytest.raises(CheckFailed) as caught:
        check(graph.path, set())
    for rule in ("sites-exactly", "cache-codes", "float-attention"):
        assert f"[{rule}]" in caught.value.message
    with pytest.raises(CheckFailed) as caught:
        check(export_float(make_model(), TOKENS).path, CACHE)
    assert f"[sites-exactly] Site {VALUE}: has no QuantizeLinear" in caught.value.message
    assert f"[cache-codes] {VALUE}: is not joined" in caught.value.message
