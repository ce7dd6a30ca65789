"""The wire format of small ONNX graphs, for edge devices without the package ``onnx``.

The encoding is that of protocol buffers, with the field numbers of ``onnx.proto``. Tests read it with ``onnx``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OPSET, IR_VERSION = 19, 9
BLOCK_OPSET = 21
"""The first with scales by block."""
FLOAT, INT8, INT64, FLOAT16 = 1, 3, 7, 10
"""Values of ``TensorProto.DataType``."""
_INT_ATTRIBUTE = 2


def model(
    name: str,
    nodes: Sequence[bytes],
    tensors: Sequence[bytes],
    values: Sequence[bytes],
    output: bytes,
    *,
    opset: int = OPSET,
) -> bytes:
    """Return a serialized model of one graph.

    Args:
        name: name of the graph.
        nodes: see :func:`node`.
        tensors: initializers, see :func:`tensor`.
        values: inputs, see :func:`value`.
        output: the output.
        opset: version of the operators.
    """
    graph = b"".join(_field(1, each) for each in nodes) + _field(2, name.encode())
    graph += b"".join(_field(5, each) for each in tensors)
    graph += b"".join(_field(11, each) for each in values) + _field(12, output)
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, opset))


def node(operator: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """Return a node with one output and integer attributes."""
    names = b"".join(_field(1, name.encode()) for name in inputs)
    extra = b"".join(
        _field(5, _field(1, name.encode()) + _field(3, number) + _field(20, _INT_ATTRIBUTE))
        for name, number in attributes.items()
    )
    return names + _field(2, output.encode()) + _field(4, operator.encode()) + extra


def tensor(name: str, values: Any) -> bytes:
    """Return an initializer of type float32, float16, int8 or int64."""
    kind = {"float32": FLOAT, "float16": FLOAT16, "int8": INT8, "int64": INT64}[values.dtype.name]
    dims = b"".join(_field(1, size) for size in values.shape)
    return dims + _field(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def value(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    """Return the description of an input or output; string dimensions are symbolic."""
    dims = (_field(1, size) if isinstance(size, int) else _field(2, size.encode()) for size in shape)
    sizes = b"".join(_field(1, each) for each in dims)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, kind) + _field(2, sizes)))


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
