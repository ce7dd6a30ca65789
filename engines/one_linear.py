"""A graph of one quantized linear, as bytes, on which an edge device without the package ``onnx`` tries its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

<<<<<<< HEAD
from cushion_deploy.engines.onnx_bytes import FLOAT, model, node, tensor, value
=======
OPSET, BLOCK_OPSET, IR_VERSION = 19, 21, 9
_FLOAT, _INT8 = 1, 3
_INT_ATTRIBUTE = 2
>>>>>>> 5d41f17da1f4ac4ef09d33bce90bcdb342800754


def one_linear(weights: Any) -> bytes:
    """Return a serialized ONNX model: float32 ``x`` ``[rows, in]``, Q/DQ with scale 1, times DQ of ``weights``: ``y``.

    Args:
        weights: int8 ``[in, out]``; every scale is 1 and every zero point 0.
    """
    width, out = weights.shape
<<<<<<< HEAD
    codes = [tensor("w", weights), tensor("w_zero", np.zeros(out, np.int8)), tensor("zero", np.array(0, np.int8))]
    scales = [tensor("w_scale", np.ones(out, np.float32)), tensor("one", np.array(1, np.float32))]
    nodes = [
        node("QuantizeLinear", ("x", "one", "zero"), "q"),
        node("DequantizeLinear", ("q", "one", "zero"), "dq"),
        node("DequantizeLinear", ("w", "w_scale", "w_zero"), "dw", axis=1),
        node("MatMul", ("dq", "dw"), "y"),
    ]
    inputs, output = [value("x", FLOAT, ("rows", width))], value("y", FLOAT, ("rows", out))
    return model("one linear", nodes, (*codes, *scales), inputs, output)
=======
    codes = [_tensor("w", weights), _tensor("w_zero", np.zeros(out, np.int8)), _tensor("zero", np.array(0, np.int8))]
    scales = [_tensor("w_scale", np.ones(out, np.float32)), _tensor("one", np.array(1, np.float32))]
    nodes = [
        _node("QuantizeLinear", ("x", "one", "zero"), "q"),
        _node("DequantizeLinear", ("q", "one", "zero"), "dq"),
        _node("DequantizeLinear", ("w", "w_scale", "w_zero"), "dw", _int_attribute("axis", 1)),
        _node("MatMul", ("dq", "dw"), "y"),
    ]
    return _model(nodes, (*codes, *scales), width, out, OPSET)


def one_head(weights: Any, block: int) -> bytes:
    """Return a serialized ONNX model: float32 ``x`` ``[rows, in]`` times DQ of ``weights`` with scales by block: ``y``.

    Args:
        weights: int8 ``[in, out]``; every scale is 1.
        block: inputs that share a scale.
    """
    width, out = weights.shape
    tensors = _tensor("w", weights), _tensor("w_scale", np.ones((width // block, out), np.float32))
    sizes = (_int_attribute("axis", 0), _int_attribute("block_size", block))
    nodes = [_node("DequantizeLinear", ("w", "w_scale"), "dw", *sizes), _node("MatMul", ("x", "dw"), "y")]
    return _model(nodes, tensors, width, out, BLOCK_OPSET)


def _model(nodes: Sequence[bytes], tensors: Sequence[bytes], width: int, out: int, opset: int) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"one linear")
    graph += b"".join(_field(5, tensor) for tensor in tensors)
    graph += _field(11, _value("x", width)) + _field(12, _value("y", out))
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, opset))


def _int_attribute(name: str, value: int) -> bytes:
    return _field(1, name.encode()) + _field(3, value) + _field(20, _INT_ATTRIBUTE)


def _node(operator: str, inputs: tuple[str, ...], output: str, *given: bytes) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    attributes = b"".join(_field(5, attribute) for attribute in given)
    return names + _field(2, output.encode()) + _field(4, operator.encode()) + attributes


def _tensor(name: str, values: Any) -> bytes:
    dims = b"".join(_field(1, size) for size in values.shape)
    kind = _INT8 if values.dtype == np.int8 else _FLOAT
    return dims + _field(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def _value(name: str, width: int) -> bytes:
    """Return the description of a float32 input or output ``[rows, width]``."""
    shape = _field(1, _field(2, b"rows")) + _field(1, _field(1, width))
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, shape)))


def _field(number: int, value: int | bytes) -> bytes:
    """Return a field of a message: an integer, or a string or message with its length before it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Return a non-negative integer in groups of seven bits, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
>>>>>>> 5d41f17da1f4ac4ef09d33bce90bcdb342800754
