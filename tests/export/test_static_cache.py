"""The graph of a static cache on disk: valid, aliased one to one, refused where a prefix or model does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cushion_deploy.core.graph_form import STATIC_OPSET, GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.export.rules import RULES, check_graph
from cushion_deploy.export.write import export_graph

TOKENS = (7, 1, 100)
CAPACITY = 64


@pytest.fixture
def export(make_model: Any, make_scales: Any, tmp_path: Path) -> Any:
    """Return a function that exports the INT8 graph of a random model."""

    def run(**options: Any) -> ExportedGraph:
        model = make_model(tie_word_embeddings=True)
        prefix = model.compute_prefix(TOKENS)
        quantization = Quantization(prefix, QuantScheme(), make_scales(model, prefix))
        form = GraphForm(**{"prefix": "cache", "cache": "static", "capacity": CAPACITY} | options)
        return export_graph(model.spec, model.weights, quantization, form, tmp_path)

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_cache_is_an_input_that_one_operator_updates_into_an_output(dtype: str, export: Any) -> None:
    graph = export(dtype=dtype)
    onnx.checker.check_model(graph.path, full_check=True)
    model = onnx.load(graph.path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", STATIC_OPSET)]
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes["write_indices"] == ["batch"]
    assert shapes["attention_mask"] == ["batch", CAPACITY]
    updates = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "TensorScatter"}
    caches = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert updates == {f"present.{name}": f"past_key_values.{name}" for name in caches}
    for name in caches:
        assert shapes[f"present.{name}"] == shapes[f"past_key_values.{name}"] == ["batch", 2, CAPACITY, 16]
        readers = [node.op_type for node in model.graph.node if f"past_key_values.{name}" in node.input]
        assert readers == ["TensorScatter"], "an update in place is read by nothing else"
    assert "logits_start" not in shapes
    assert graph.rules == tuple(RULES)
    assert (graph.opset, graph.contract.cache_capacity, graph.contract.prefix_slots) == (24, CAPACITY, len(TOKENS))
    assert ExportedGraph.from_json(json.loads(json.dumps(graph.to_json())), graph.path.parent) == graph


def test_what_a_growing_cache_says_of_itself_does_not_mention_a_capacity(export: Any) -> None:
    graph = export(cache="growing", capacity=0)
    assert graph.opset == 17
    assert "cache_capacity" not in graph.to_json()["contract"]
    assert ExportedGraph.from_json(graph.to_json(), graph.path.parent).contract.cache_capacity == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": "baked"}, "cannot be combined with a prefix"),
        ({"capacity": 3}, "3 slots does not fit a prefix of 3"),
        ({"capacity": 129}, "a model of 128 positions"),
    ],
)
def test_a_capacity_that_cannot_be_is_refused(options: Any, words: str, export: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        export(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_input_of_the_attention_operator_is_a_broken_rule(export: Any) -> None:
    import onnx_ir as ir

    graph = export()
    model = ir.load(graph.path)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    scale, zero = (ir.node("Constant", [], {"value": ir.tensor(x)}) for x in (np.float32(1), np.int8(0)))
    quantize = ir.node("QuantizeLinear", [attention.inputs[0], scale.outputs[0], zero.outputs[0]], name="q")
    back = ir.node("DequantizeLinear", [quantize.outputs[0], scale.outputs[0], zero.outputs[0]], name="dq")
    model.graph.insert_before(attention, [scale, zero, quantize, back])
    attention.replace_input_with(0, back.outputs[0])
    with pytest.raises(CheckFailed, match=r"\[float-attention\] .*Attention.*: reads dq"):
        check_graph(model, set(graph.sites))
