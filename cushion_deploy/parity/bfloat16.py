"""Emulate a bfloat16 graph on the CPU, where ONNX Runtime has no bfloat16 kernels: float32 between the roundings.

Stored bfloat16 tensors become float32 with the same values, and a cast to bfloat16 is followed by a cast back to
float32. Structure and constants stay those of the graph; only products and sums are more precise than on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def emulate_bfloat16(model: Any) -> None:
    """Replace the bfloat16 values of a graph (``onnx_ir.Model``) by rounded float32 values, in place."""
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
