"""A graph that cuts one axis of a tensor, as bytes: it cuts a cache where it lies, in the memory of a device."""

from __future__ import annotations

import numpy as np

from cushion_deploy.engines.onnx_bytes import FLOAT, INT8, INT64, model, node, tensor, value

FLOAT16 = 10
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
