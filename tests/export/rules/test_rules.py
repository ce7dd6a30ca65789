"""All rules together, on a small graph: whole it passes, and every rule says how much of it it examined."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import onnx_ir as ir
from small_graph import HEAD, IN, OUT, PACKED, QKV, SITES, broken_lines, check, node, put, rewire, whole

from cushion_deploy.export import rules
from cushion_deploy.export.rules import RULES
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph


def test_a_whole_graph_passes_every_rule_and_all_of_it_is_examined() -> None:
    assert check(whole()) == {
        "standard-operators": 15,  # every node
        "sites-exactly": 2 + 2,  # Q nodes and expected Sites
        "one-consumer": 2 + 2,  # Q and DQ of activations
        "zero-points": 2 + 4,  # Q, and DQ of activations and weights
        "activation-scales": 4,
        "weight-codes": 2,
        "weight-scales": 2,
        "both-operands": 2,
        "float-attention": 2,  # the two products of attention, not the floating-point linear
        "cache-codes": 0,
        "no-float-twin": 6,  # floating-point initializers
        "embedding-codes": 0,
    }


def test_a_graph_without_quantized_weights_passes_no_rule_for_want_of_anything_to_examine() -> None:
    model = whole()
    for site, x, size in ((QKV, "x", (IN, PACKED)), (HEAD, "context", (2, OUT))):
        put(model, f"{site}.plain", np.ones(size, np.float32))
        rewire(model, f"{site}/MatMul", 0, x)
        rewire(model, f"{site}/MatMul", 1, f"{site}.plain")
    graph = QuantizedGraph(ir.serde.deserialize_model(model), frozenset(SITES))
    for rule in ("weight-codes", "weight-scales", "both-operands"):
        assert RULES[rule].run(graph) == (0, [])
    lines = broken_lines(model)
    assert [line for line in lines if line.startswith(f"[one-consumer] {QKV}/DQ: feeds nothing")]
    assert [line for line in lines if line.startswith(f"[one-consumer] {HEAD}/DQ: feeds nothing")]


def test_every_rule_has_a_file_and_a_test_that_breaks_it() -> None:
    for name in RULES:
        module = name.replace("-", "_")
        assert Path(rules.__file__).with_name(f"{module}.py").is_file()
        test = ast.parse(Path(__file__).with_name(f"test_{module}.py").read_text())
        texts = [n.value for n in ast.walk(test) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert any(text == name or f"[{name}]" in text for text in texts)


def test_all_violations_are_reported_at_once() -> None:
    model = whole()
    put(model, f"{QKV}.scale", np.array(0.0, np.float32))
    node(model, f"{QKV}/weight_DQ").attribute[0].i = 0
    put(model, f"{QKV}.weight_scales", np.full(IN, 0.01, np.float32))
    node(model, "softmax").domain = "com.microsoft"
    # Q and DQ share the scale, so there are four violations.
    assert len(broken_lines(model)) == 4
