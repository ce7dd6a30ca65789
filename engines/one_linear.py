"""A graph of one quantized linear, as bytes: what an edge device without the package ``onnx`` can try its kernels on.

The encoding is that of protocol buffers, with the field numbers of ``onnx.proto``. A test reads it with ``onnx``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

OPSET, IR_VERSION = 19, 9
_FLOAT, _INT8 = 1, 3
_INT_ATTRIBUTE = 2


def one_linear(weights: Any) -> bytes:
    """Return a serialized ONNX model: float32 ``x`` ``[rows, in]``, Q/DQ with scale 1, times DQ of ``weights``: ``y``.

    Args:
        weights: int8 ``[in, out]``; every scale is 1 and every zero point 0.
    """
    width, out = weights.shape
    codes = [_tensor("w", weights), _tensor("w_zero", np.zeros(out, np.int8)), _tensor("zero", np.array(0, np.int8))]
    scales = [_tensor("w_scale", np.ones(out, np.float32)), _tensor("one", np.array(1, np.float32))]
    axis = _field(1, b"axis") + _field(3, 1) + _field(20, _INT_ATTRIBUTE)
    nodes = [
        _node("QuantizeLinear", ("x", "one", "zero"), "q"),
        _node("DequantizeLinear", ("q", "one", "zero"), "dq"),
        _node("DequantizeLinear", ("w", "w_scale", "w_zero"), "dw", axis),
        _node("MatMul", ("dq", "dw"), "y"),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"one linear")
    graph += b"".join(_field(5, tensor) for tensor in (*codes, *scales))
    graph += _field(11, _value("x", width)) + _field(12, _value("y", out))
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, OPSET))


def _node(operator: str, inputs: tuple[str, ...], output: str, attribute: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    attributes = _field(5, attribute) if attribute else b""
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
