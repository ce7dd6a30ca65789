"""A small graph written with onnx.helper that obeys every rule, and functions to damage it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.rules import check_graph

QKV, HEAD = Site("layers.0.attn.qkv"), Site("head")
SITES = {QKV, HEAD}
IN, PACKED, OUT = 4, 6, 5

Edit = Callable[[onnx.ModelProto], None]


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


def check(model: onnx.ModelProto, sites: Collection[Site] = SITES) -> dict[str, int]:
    """Check a model as the exporter does; return how much each rule examined."""
    return check_graph(ir.serde.deserialize_model(model), sites)


def broken_lines(model: onnx.ModelProto, sites: Collection[Site] = SITES) -> list[str]:
    """Return the violations of a model that breaks a rule, one a line: ``[rule] node: found; remedy``."""
    with pytest.raises(CheckFailed) as caught:
        check(model, sites)
    first, *lines = caught.value.message.splitlines()
    assert first == f"the graph breaks {len(lines)} INT8 rules:"
    assert all("; " in line for line in lines)
    return lines


def assert_broken(rule: str, words: str, damage: Edit) -> None:
    """Assert that a damaged graph breaks a rule, and that a violation of it begins with some words."""
    model = whole()
    damage(model)
    lines = broken_lines(model)
    assert [line for line in lines if line.startswith(f"[{rule}] {words}")], lines
