"""A graph of one quantized linear, as bytes, on which an edge device without the package ``onnx`` tries its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from cushion_deploy.engines.onnx_bytes import BLOCK_OPSET, FLOAT, model, node, tensor, value


def one_linear(weights: Any) -> bytes:
    """Return a serialized ONNX model: float32 ``x`` ``[rows, in]``, Q/DQ with scale 1, times DQ of ``weights``: ``y``.

    Args:
        weights: int8 ``[in, out]``; every scale is 1 and every zero point 0.
    """
    width, out = weights.shape
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


def one_head(weights: Any, block: int) -> bytes:
    """Return a serialized ONNX model: float32 ``x`` ``[rows, in]`` times DQ of ``weights`` with scales by block: ``y``.

    It has the nodes of an exported head: codes by row of the table, their Transpose, and written-out zero points.

    Args:
        weights: int8 ``[in, out]``; every scale is 1 and every zero point 0.
        block: inputs that share a scale.
    """
    width, out = weights.shape
    shape = width // block, out
    codes = [tensor("table", np.ascontiguousarray(weights.T)), tensor("w_zero", np.zeros(shape, np.int8))]
    tensors = [*codes, tensor("w_scale", np.ones(shape, np.float32))]
    nodes = [
        node("Transpose", ("table",), "w"),
        node("DequantizeLinear", ("w", "w_scale", "w_zero"), "dw", axis=0, block_size=block),
        node("MatMul", ("x", "dw"), "y"),
    ]
    inputs, output = [value("x", FLOAT, ("rows", width))], value("y", FLOAT, ("rows", out))
    return model("one head", nodes, tensors, inputs, output, opset=BLOCK_OPSET)
