"""A bfloat16 graph as ONNX Runtime can run it on a CPU, where it has no such kernels: float32 between the roundings.

Every stored bfloat16 tensor keeps its rounded values in float32, and every cast to bfloat16 rounds as before and widens
again. So structure and constants are those of the graph; only products and sums are more precise than a GPU's.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def widen(model: Any) -> None:
    """Turn the bfloat16 values of a graph (``onnx_ir.Model``) into float32 ones, in place."""
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in list(model.graph.initializers.values()):
        if value.dtype == narrow:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value, value.type = ir.Tensor(array, name=value.name), ir.TensorType(wide)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            rounded = node.outputs[0]
            again = ir.node("Cast", [rounded], {"to": int(wide)}, name=f"{node.name}/widened")
            ir.convenience.replace_all_uses_with(rounded, again.outputs[0])
            again.replace_input_with(0, rounded)
            model.graph.insert_after(node, again)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
