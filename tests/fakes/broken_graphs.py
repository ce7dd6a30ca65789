"""Edits of a graph after which one linear can no longer run in INT8."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VICTIM = "layers.1.mlp.gate_up"


def producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if name in n.output)


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if name in n.input)


def float_reader(model: onnx.ModelProto, value: str) -> None:
    """Add a floating-point linear that reads a value."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "extra.weight"))
    model.graph.node.append(helper.make_node("MatMul", [value, "extra.weight"], ["extra"], "extra"))
    model.graph.output.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, None))


def second_consumer_of_dq(model: onnx.ModelProto) -> None:
    float_reader(model, reader(model, f"{VICTIM}.codes").output[0])


def second_consumer_of_q(model: onnx.ModelProto) -> None:
    inputs = [f"{VICTIM}.codes", f"{VICTIM}.scale", "zero_point"]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["extra.dq"], "extra.dq"))
    float_reader(model, "extra.dq")


def codes_as_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(f"{VICTIM}.codes", TensorProto.INT8, None))


def float_weight(model: onnx.ModelProto) -> None:
    dq = reader(model, f"{VICTIM}.weight_codes")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 192), np.float32), "twin"))
    reader(model, dq.output[0]).input[1] = "twin"
    model.graph.node.remove(dq)


def float_linear(model: onnx.ModelProto) -> None:
    float_weight(model)
    q = producer(model, f"{VICTIM}.codes")
    dq = reader(model, f"{VICTIM}.codes")
    reader(model, dq.output[0]).input[0] = q.input[0]
    model.graph.node.remove(q)
    model.graph.node.remove(dq)
