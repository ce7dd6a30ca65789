"""Graphs that cut and join caches, as bytes: they run where the cache lies, in the memory of a device.

Shapes in comments: B rows of a cache, K key/value heads, T its slots, D head size.
"""

from __future__ import annotations

import numpy as np

from cushion_deploy.engines.onnx_bytes import FLOAT, FLOAT16, INT8, INT64, model, node, tensor, value

TYPES = {"tensor(float)": FLOAT, "tensor(float16)": FLOAT16, "tensor(int8)": INT8}
"""Values of ``TensorProto.DataType`` by the name that ONNX Runtime gives a type."""


def slice_graph(kind: str, rank: int, axis: int) -> bytes:
    """Return a serialized ONNX model with ``y = x[..., start:end, ...]`` on ``axis``.

    ``start`` and ``end`` are int64 ``[1]``, ``x`` and ``y`` of type ``kind``, a key of :data:`TYPES`.
    """
    shape, cut = [f"d{i}" for i in range(rank)], [f"d{i}" if i != axis else "kept" for i in range(rank)]
    inputs = [value("x", TYPES[kind], shape), value("start", INT64, (1,)), value("end", INT64, (1,))]
    axes = tensor("axis", np.array([axis], dtype=np.int64))
    nodes = [node("Slice", ("x", "start", "end", "axis"), "y")]
    return model("slice", nodes, [axes], inputs, value("y", TYPES[kind], cut))


def gather_graph(kind: str, rows: int) -> bytes:
    """Return a serialized ONNX model that puts rows of caches together, padded on the left: ``y`` ``[rows, K, T, D]``.

    Row i of ``y`` is ``x<i>[b, :, 0:p]``, zeros, and ``x<i>[b, :, t:u]``, one after the other.

    Args:
        kind: type of ``x<i>`` and ``y``, a key of :data:`TYPES`.
        rows: number of rows.

    Its inputs for row i: ``x<i>`` ``[B, K, T, D]``; int64 ``[2]``: ``first<i>`` (b, 0), ``kept<i>`` (b + 1, p),
    ``begin<i>`` (b, t) and ``end<i>`` (b + 1, u); int64 ``[4]``: ``padding<i>``, the shape of the zeros.
    """
    element = TYPES[kind]
    zero = np.zeros(1, {FLOAT: np.float32, FLOAT16: np.float16, INT8: np.int8}[element])
    constants = [tensor("axes", np.array([0, 2], dtype=np.int64)), tensor("zero", zero)]
    nodes, inputs = [], []
    for i in range(rows):
        nodes += [
            node("Slice", (f"x{i}", f"first{i}", f"kept{i}", "axes"), f"prefix{i}"),
            node("Expand", ("zero", f"padding{i}"), f"zeros{i}"),
            node("Slice", (f"x{i}", f"begin{i}", f"end{i}", "axes"), f"tokens{i}"),
            node("Concat", (f"prefix{i}", f"zeros{i}", f"tokens{i}"), f"row{i}", axis=2),
        ]
        inputs += [value(f"x{i}", element, (f"B{i}", "K", f"T{i}", "D"))]
        inputs += [value(f"{name}{i}", INT64, (2,)) for name in ("first", "kept", "begin", "end")]
        inputs += [value(f"padding{i}", INT64, (4,))]
    nodes.append(node("Concat", [f"row{i}" for i in range(rows)], "y", axis=0))
    return model("gather", nodes, constants, inputs, value("y", element, (rows, "K", "slots", "D")))
