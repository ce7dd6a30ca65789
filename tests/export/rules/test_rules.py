"""The INT8 rules, on a small graph written with onnx.helper: whole it passes, broken in one way it names that way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.rules import RULES, check_graph

QKV, HEAD = Site("layers.0.attn.qkv"), Site("head")
SITES = {QKV, HEAD}
IN, PACKED, OUT = 4, 6, 5


def linear(site: str, x: str, y: str, size: tuple[int, int]) -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray]]:
    """Return nodes and tensors of one quantized linear."""
    codes = np.arange(size[0] * size[1]).reshape(size).astype(np.int8)
    tensors = {
        f"{site}.scale": np.array(0.02, np.float32),
        f"{site}.zero": np.array(0, np.int8),
        f"{site}.weight_codes": codes,
        f"{site}.weight_scales": np.full(size[1], 0.01, np.float32),
        f"{site}.weight_zeros": np.zeros(size[1], np.int8),
    }
    scale, zero, weight, weight_scale, weight_zero = tensors
    dq = "DequantizeLinear"
    nodes = [
        helper.make_node("QuantizeLinear", [x, scale, zero], [f"{site}.codes"], f"{site}/Q"),
        helper.make_node(dq, [f"{site}.codes", scale, zero], [f"{site}.dq"], f"{site}/DQ"),
        helper.make_node(dq, [weight, weight_scale, weight_zero], [f"{site}.w"], f"{site}/weight_DQ", axis=1),
        helper.make_node("MatMul", [f"{site}.dq", f"{site}.w"], [y], f"{site}/MatMul"),
    ]
    return nodes, tensors


def whole() -> onnx.ModelProto:
    """Return a graph that obeys every rule: a packed linear, attention, a head, and an embedding."""
    first, tensors = linear(QKV, "x", "packed", (IN, PACKED))
    last, more = linear(HEAD, "context", "y", (2, OUT))
    tensors |= more | {
        "embedding": np.ones((OUT, 2), np.float32),
        "plain.weight": np.ones((OUT, 3), np.float32),
        "split": np.array([2, 2, 2], np.int64),
    }
    attention = [
        helper.make_node("Split", ["packed", "split"], ["q", "k", "v"], "split", axis=2),
        helper.make_node("Transpose", ["k"], ["kt"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], "scores"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["context"], "context"),
    ]
    extra = [
        helper.make_node("Gather", ["embedding", "ids"], ["rows"], "gather"),
        helper.make_node("MatMul", ["y", "plain.weight"], ["z"], "float_linear"),
    ]
    graph = helper.make_graph(
        [*first, *attention, *last, *extra],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, IN]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3, 3]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, 2]),
        ],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """Return a node by name."""
    return next(n for n in model.graph.node if n.name == name)


def put(model: onnx.ModelProto, name: str, array: npt.NDArray) -> None:
    """Add or replace an initializer."""
    tensor = next((t for t in model.graph.initializer if t.name == name), None)
    if tensor is None:
        tensor = model.graph.initializer.add()
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def insert(model: onnx.ModelProto, before: str, *nodes: onnx.NodeProto) -> None:
    """Insert nodes before a node."""
    index = next(i for i, n in enumerate(model.graph.node) if n.name == before)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(index + offset, new)


def rewire(model: onnx.ModelProto, name: str, index: int, value: str) -> None:
    """Let an input of a node read another value."""
    node(model, name).input[index] = value


def scale(value: float, name: str = f"{QKV}.scale") -> Callable[[onnx.ModelProto], None]:
    return lambda model: put(model, name, np.array(value, np.float32))


def weight_scale(value: float) -> Callable[[onnx.ModelProto], None]:
    return lambda model: put(model, f"{HEAD}.weight_scales", np.array([0.01] * (OUT - 1) + [value], np.float32))


def computed_scale(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("asked", TensorProto.FLOAT, []))
    for name in ("Q", "DQ"):
        rewire(model, f"{QKV}/{name}", 1, "asked")


def overridable_scale(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info(f"{QKV}.scale", TensorProto.FLOAT, []))


def two_scales(model: onnx.ModelProto) -> None:
    put(model, "other", np.array(0.03, np.float32))
    rewire(model, f"{QKV}/DQ", 1, "other")


def half_scale(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.scale", np.array(0.02, np.float16))


def contracting(model: onnx.ModelProto) -> None:
    node(model, f"{QKV}/weight_DQ").attribute[0].i = 0
    put(model, f"{QKV}.weight_scales", np.full(IN, 0.01, np.float32))


def negative_contracting(model: onnx.ModelProto) -> None:
    node(model, f"{QKV}/weight_DQ").attribute[0].i = -2
    put(model, f"{QKV}.weight_scales", np.full(IN, 0.01, np.float32))


def unsigned(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.zero", np.array(0, np.uint8))


def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model, f"{QKV}/Q").input[2]


def second_consumer(model: onnx.ModelProto) -> None:
    codes, s, z = f"{QKV}.codes", f"{QKV}.scale", f"{QKV}.zero"
    model.graph.node.append(helper.make_node("DequantizeLinear", [codes, s, z], ["again"], "second_DQ"))


def codes_are_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(f"{QKV}.codes", TensorProto.INT8, [1, 3, IN]))


def dq_feeds_another(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", [f"{QKV}.dq"], ["relu"], "relu"))


def float_activation(model: onnx.ModelProto) -> None:
    rewire(model, f"{HEAD}/MatMul", 0, "context")


def float_weight(model: onnx.ModelProto) -> None:
    put(model, "floating", np.ones((2, OUT), np.float32))
    rewire(model, f"{HEAD}/MatMul", 1, "floating")


def quantized_in_graph(model: onnx.ModelProto) -> None:
    put(model, "floating", np.ones((2, OUT), np.float32))
    names = [f"{HEAD}.weight_scales", f"{HEAD}.weight_zeros"]
    q = helper.make_node("QuantizeLinear", ["floating", *names], ["late"], "weight_Q", axis=1)
    insert(model, f"{HEAD}/weight_DQ", q)
    rewire(model, f"{HEAD}/weight_DQ", 0, "late")


def unquantized_activation_codes(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("codes_in", TensorProto.INT8, [1, 3, IN]))
    rewire(model, f"{QKV}/DQ", 0, "codes_in")


def around(model: onnx.ModelProto, before: str, value: str, reader: str, index: int) -> None:
    s, z = f"{QKV}.scale", f"{QKV}.zero"
    insert(
        model,
        before,
        helper.make_node("QuantizeLinear", [value, s, z], ["inner.codes"], "inner_Q"),
        helper.make_node("DequantizeLinear", ["inner.codes", s, z], ["inner"], "inner_DQ"),
    )
    rewire(model, reader, index, "inner")


def dq_on_scores(model: onnx.ModelProto) -> None:
    around(model, "scores", "q", "scores", 0)


def dq_before_transpose(model: onnx.ModelProto) -> None:
    around(model, "transpose", "k", "transpose", 0)


def dq_on_softmax(model: onnx.ModelProto) -> None:
    around(model, "context", "p", "context", 0)


def foreign(model: onnx.ModelProto) -> None:
    node(model, "softmax").domain = "com.microsoft"


def integer_matmul(model: onnx.ModelProto) -> None:
    codes, weight = f"{QKV}.codes", f"{QKV}.weight_codes"
    model.graph.node.append(helper.make_node("MatMulInteger", [codes, weight], ["i"], "integer"))


def dynamic(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "dynamic"))


def twin_in_use(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.weight", np.ones((IN, PACKED), np.float32))
    model.graph.node.append(helper.make_node("MatMul", ["x", f"{QKV}.weight"], ["twin"], "twin"))


def twin_unused_transposed(model: onnx.ModelProto) -> None:
    put(model, "leftover", np.ones((PACKED, IN), np.float16))


BROKEN: list[tuple[str, str, Callable[[onnx.ModelProto], None]]] = [
    ("standard-operators", "softmax: is com.microsoft::Softmax", foreign),
    ("standard-operators", "integer: is MatMulInteger", integer_matmul),
    ("standard-operators", "dynamic: is DynamicQuantizeLinear", dynamic),
    ("one-consumer", f"{QKV}/Q: has consumers DequantizeLinear, DequantizeLinear", second_consumer),
    ("one-consumer", f"{QKV}/Q: has consumers DequantizeLinear, graph output", codes_are_output),
    ("one-consumer", f"{QKV}/DQ: feeds Relu", dq_feeds_another),
    ("zero-points", f"{QKV}/Q: has a zero point other than 0", lambda m: put(m, f"{QKV}.zero", np.array(-3, np.int8))),
    ("zero-points", f"{QKV}/DQ: has a zero point of type UINT8", unsigned),
    ("zero-points", f"{QKV}/Q: has no zero point", no_zero_point),
    (
        "zero-points",
        f"{HEAD}/weight_DQ: has a zero point other than 0 (up to 128",
        lambda m: put(m, f"{HEAD}.weight_zeros", np.array([0] * (OUT - 1) + [-128], np.int8)),
    ),
    ("activation-scales", f"{QKV}/Q: has a scale that is NaN", scale(float("nan"))),
    ("activation-scales", f"{QKV}/Q: has a scale that is NaN or infinite", scale(float("inf"))),
    ("activation-scales", f"{QKV}/DQ: has a scale of 0.0, which is not positive", scale(0.0)),
    ("activation-scales", f"{QKV}/Q: has a scale of -1.0, which is not positive", scale(-1.0)),
    ("activation-scales", f"{QKV}/Q: has a subnormal scale of 1e-39", scale(1e-39)),
    (
        "activation-scales",
        f"{QKV}/Q: has a scale of shape [4]",
        lambda m: put(m, f"{QKV}.scale", np.ones(4, np.float32)),
    ),
    ("activation-scales", f"{QKV}/Q: has a scale of type FLOAT16", half_scale),
    ("activation-scales", f"{QKV}/Q: takes its scale from", computed_scale),
    ("activation-scales", f"{QKV}/Q: takes its scale from", overridable_scale),
    ("activation-scales", f"{QKV}/DQ: has another scale than {QKV}/Q", two_scales),
    ("weight-codes", f"{HEAD}/weight_DQ: reads a weight that is not stored", quantized_in_graph),
    (
        "weight-codes",
        f"{HEAD}/weight_DQ: reads a weight of type UINT8",
        lambda m: put(m, f"{HEAD}.weight_codes", np.ones((2, OUT), np.uint8)),
    ),
    ("weight-scales", f"{QKV}/weight_DQ: scales the contracting axis 0", contracting),
    ("weight-scales", f"{QKV}/weight_DQ: scales the contracting axis 0", negative_contracting),
    (
        "weight-scales",
        f"{HEAD}/weight_DQ: has 4 scales for 5 output channels",
        lambda m: put(m, f"{HEAD}.weight_scales", np.ones(OUT - 1, np.float32)),
    ),
    (
        "weight-scales",
        f"{HEAD}/weight_DQ: has a scale of 0 dimensions",
        lambda m: put(m, f"{HEAD}.weight_scales", np.array(0.01, np.float32)),
    ),
    (
        "weight-scales",
        f"{HEAD}/weight_DQ: has scales of type FLOAT16",
        lambda m: put(m, f"{HEAD}.weight_scales", np.ones(OUT, np.float16)),
    ),
    ("weight-scales", f"{HEAD}/weight_DQ: has a scale that is NaN", weight_scale(float("nan"))),
    ("weight-scales", f"{HEAD}/weight_DQ: has a scale of 0.0, which is not positive", weight_scale(0.0)),
    ("weight-scales", f"{HEAD}/weight_DQ: has a subnormal scale", weight_scale(1e-40)),
    ("both-operands", f"{HEAD}/MatMul: has its first operand in floating point", float_activation),
    ("both-operands", f"{HEAD}/MatMul: has its second operand in floating point", float_weight),
    ("both-operands", f"{QKV}/MatMul: has an activation that no Q wrote", unquantized_activation_codes),
    ("float-attention", "scores: reads inner_DQ", dq_on_scores),
    ("float-attention", "scores: reads inner_DQ", dq_before_transpose),
    ("float-attention", "context: reads inner_DQ", dq_on_softmax),
    ("no-float-twin", f"initializer {QKV}.weight", twin_in_use),
    ("no-float-twin", "initializer leftover", twin_unused_transposed),
]


def check(model: onnx.ModelProto, sites: set[Site] = SITES) -> dict[str, int]:
    """Check a model as the exporter does."""
    return check_graph(ir.serde.deserialize_model(model), sites)


def test_a_whole_graph_passes_every_rule() -> None:
    assert list(check(whole())) == list(RULES)


def test_a_gemm_scales_its_output_channels_too() -> None:
    model = whole()
    put(model, "rows_shape", np.array([-1, 2], np.int64))
    insert(model, f"{HEAD}/Q", helper.make_node("Reshape", ["context", "rows_shape"], ["flat"], "flatten"))
    rewire(model, f"{HEAD}/Q", 0, "flat")
    gemm = node(model, f"{HEAD}/MatMul")
    gemm.op_type = "Gemm"
    gemm.attribute.append(helper.make_attribute("transB", 1))
    put(model, f"{HEAD}.weight_codes", np.ones((OUT, 2), np.int8))
    node(model, f"{HEAD}/weight_DQ").attribute[0].i = 0
    del model.graph.output[0].type.tensor_type.shape.dim[0]
    onnx.checker.check_model(model, full_check=True)
    assert list(check(model)) == list(RULES)
    node(model, f"{HEAD}/weight_DQ").attribute[0].i = 1
    put(model, f"{HEAD}.weight_scales", np.full(2, 0.01, np.float32))
    with pytest.raises(CheckFailed, match="scales the contracting axis 1"):
        check(model)


@pytest.mark.parametrize(("rule", "words", "damage"), BROKEN, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(BROKEN)])
def test_a_violation_names_rule_node_and_remedy(
    rule: str, words: str, damage: Callable[[onnx.ModelProto], None]
) -> None:
    model = whole()
    damage(model)
    with pytest.raises(CheckFailed) as caught:
        check(model)
    lines = [line for line in caught.value.message.splitlines() if line.startswith(f"[{rule}] {words}")]
    assert lines, caught.value.message
    assert all("; " in line for line in lines)


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} | {"sites-exactly", "cache-codes"} == set(RULES)


def test_a_site_without_q_and_a_q_without_site_are_both_told() -> None:
    other = Site("layers.0.mlp.down")
    with pytest.raises(CheckFailed) as caught:
        check(whole(), {QKV, other})
    assert f"[sites-exactly] Site {other}: has no QuantizeLinear" in caught.value.message
    assert f"[sites-exactly] {HEAD}/Q: quantizes to 'head.codes'" in caught.value.message
    assert QKV not in caught.value.message


def test_all_violations_are_told_at_once() -> None:
    model = whole()
    scale(0.0)(model)
    contracting(model)
    foreign(model)
    with pytest.raises(CheckFailed) as caught:
        check(model)
    # Q and DQ share the scale, so there are four lines of violations.
    assert "breaks 4 INT8 rules" in caught.value.message
    assert len(caught.value.message.splitlines()) == 5
