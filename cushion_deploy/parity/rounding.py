"""Run a 16-bit graph on the CPU in float32, with the result of every operator rounded to the type of the graph.

ONNX Runtime has no bfloat16 kernels for a CPU, and few for float16: around most operators it inserts casts to float32,
and removes those between two of them again. A sum above 65,504 then stays finite, and nothing shows that the same graph
overflows where operators really have half as output.
"""

from __future__ import annotations

from typing import Any

from cushion_deploy.core.dtypes import Dtype

MOVES = frozenset(
    ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "TensorScatter", "Transpose")
) | {"Unsqueeze", "Where"}
"""Operators whose results are elements of their inputs: there is nothing to round."""
_OTHER_TYPE = frozenset(("Equal", "Greater", "Less", "LessOrEqual", "QuantizeLinear", "Shape"))
"""Operators whose results do not have the type of their inputs."""


def narrow_nodes(model: Any, dtype: Dtype) -> list[Any]:
    """Return the nodes of a graph (``onnx_ir.Model``) whose results have a 16-bit type, in order of computation."""
    graph, narrow = model.graph, _element(dtype)
    values = {value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == narrow}
    found = []
    for node in graph:
        if node.op_type == "Cast":
            is_narrow = node.attributes["to"].as_int() == narrow
        elif node.op_type == "DequantizeLinear":
            is_narrow = node.inputs[1] in values
        else:
            is_narrow = node.op_type not in _OTHER_TYPE and any(value in values for value in node.inputs)
        if is_narrow:
            values.update(node.outputs)
            found.append(node)
    return found


def widen(model: Any, dtype: Dtype, *, rounded: bool = True) -> None:
    """Make a 16-bit graph (``onnx_ir.Model``) compute in float32, in place; stored tensors keep their type.

    Args:
        model: the graph; its inputs and outputs of that type become float32.
        dtype: type of the graph, one of 16 bits.
        rounded: round every result that has this type; values beyond its range become infinite. False leaves them as
            float32 computes them.
    """
    import onnx_ir as ir

    graph, wide, narrow = model.graph, ir.DataType.FLOAT, _element(dtype)
    for node in narrow_nodes(model, dtype):
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(wide))
        if rounded and node.op_type not in MOVES:
            for value in node.outputs:
                _round(model, node, value, narrow)
    for value in list(graph.initializers.values()):
        if value.dtype == narrow:
            _cast_stored(model, value)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)


def _element(dtype: Dtype) -> Any:
    """Return a 16-bit type as an ``onnx_ir.DataType``."""
    import onnx_ir as ir

    return {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]


def _round(model: Any, node: Any, value: Any, narrow: Any) -> None:
    """Let everything that reads a value read it rounded to ``narrow``."""
    import onnx_ir as ir

    down = ir.node("Cast", [value], {"to": int(narrow)}, name=f"{value.name}/rounded")
    up = ir.node("Cast", down.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/widened")
    ir.convenience.replace_all_uses_with(value, up.outputs[0])
    down.replace_input_with(0, value)
    model.graph.insert_after(node, [down, up])


def _cast_stored(model: Any, value: Any) -> None:
    """Let everything that reads an initializer read it as float32; what is stored on disk stays as it is."""
    import onnx_ir as ir

    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/widened")
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    cast.replace_input_with(0, value)
    model.graph.insert_before(model.graph[0], cast)
