"""Rewrite the linears of a quantized float16 graph to multiply in float16 what the INT8 codes stand for.

The canonical float16 graph keeps scales, accumulators and products of quantized linears in float32, because an engine
with INT8 kernels fuses all of that. A provider that multiplies floats would run float32 products. Here the values that
a linear multiplies are cast to float16 first: codes times scale, rounded to half, accumulated as the provider does.
"""

from __future__ import annotations

from typing import Any

from cushion_deploy.core.sites import Site


def multiply_in_float16(model: Any) -> set[Site]:
    """Rewrite every quantized linear of a graph (``onnx_ir.Model``) in place; return their Sites.

    Before, ``Cast(Add(MatMul(DQ(codes), DQ(weight codes)), bias))`` in float32, with the bias where there is one;
    after, ``Add(MatMul(Cast(DQ(codes)), Cast(DQ(weight codes))), Cast(bias))`` in float16. Codes, scales and quantizers
    stay.
    """
    found = set()
    for node in list(model.graph):
        if node.op_type == "MatMul" and all(_is_dequantized(value) for value in node.inputs):
            _rewrite(model.graph, node)
            found.add(_site(node))
    return found


def _rewrite(graph: Any, product: Any) -> None:
    for i in range(2):
        _narrow(graph, product, i)
    last = product
    reader, index = next(iter(last.outputs[0].uses()))
    if reader.op_type == "Add":
        _narrow(graph, reader, 1 - index)
        last = reader
    _become_half(product, last)


def _become_half(*nodes: Any) -> None:
    """Declare the results of nodes as float16, and let readers of their casts to float16 read them directly."""
    import onnx_ir as ir

    for node in nodes:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    value = nodes[-1].outputs[0]
    for cast in [user for user, _ in value.uses() if user.op_type == "Cast"]:
        # A cast of half to half moves nothing; it stays only where it names an output of the graph.
        if not cast.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(cast.outputs[0], value)
            cast.graph.remove(cast, safe=True)


def _narrow(graph: Any, node: Any, index: int) -> None:
    """Cast one input of a node to float16."""
    import onnx_ir as ir

    value = node.inputs[index]
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)}, name=f"{node.name}/half_{index}")
    cast.outputs[0].name = f"{node.name}/half_{index}"
    node.replace_input_with(index, cast.outputs[0])
    graph.insert_before(node, cast)


def _is_dequantized(value: Any) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _site(product: Any) -> Site:
    """Return the Site whose codes a linear multiplies."""
    codes = product.inputs[0].producer().inputs[0].producer().inputs[0]
    return Site(codes.name.removesuffix(".codes"))
