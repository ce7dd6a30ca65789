"""Rule embedding-codes: an INT8 embedding is stored once, with one positive scale per block for all readers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.core.schemes import EMBEDDING_BLOCK
from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.positive_scale import unusable
from cushion_deploy.export.rules.quantized_graph import (
    DQ,
    QuantizedGraph,
    attribute_of,
    name_of,
    stored,
    uncast,
    untransposed,
)

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _subjects(graph: QuantizedGraph) -> list[ir.Node | None]:
    return [*graph.row_gathers] or [None] * graph.int8_embedding


def _check(graph: QuantizedGraph, gather: ir.Node | None) -> Iterator[Violation]:
    """Check the Gather that reads codes, and every other reader of them."""
    if gather is None:
        yield Violation("the embedding", "is not stored as INT8 codes", "gather its rows from int8 codes")
        return
    codes, scales = gather.inputs[0], _scales(gather)
    tensor = stored(scales)
    if codes is None or scales is None or tensor is None:
        found = "is not multiplied by stored scales of the same row"
        yield Violation(name_of(gather), found, "write Mul(Reshape(Cast(Gather(codes, ids))), Gather(scales, ids))")
        return
    yield from _by_block(gather, codes, tensor)
    for reader in codes.consumers():
        if reader is not gather:
            yield from _head(reader, scales)
    for other in graph.model.graph.initializers.values():
        if other is not codes and other.shape == codes.shape:
            yield Violation(f"initializer {other.name}", "stores the embedding a second time", "remove it")


def _scales(gather: ir.Node) -> ir.Value | None:
    """Return the value whose rows, of the same ids, multiply the gathered codes; None if nothing does."""
    cast = _only_reader(gather.outputs[0], "Cast")
    blocks = _only_reader(cast.outputs[0], "Reshape") if cast is not None else None
    product = _only_reader(blocks.outputs[0], "Mul") if blocks is not None else None
    if cast is None or blocks is None or product is None or attribute_of(cast, "to", 0) != ir.DataType.FLOAT:
        return None
    others = [value.producer() for value in product.inputs if value is not None and value is not blocks.outputs[0]]
    if len(others) != 1 or others[0] is None or others[0].op_type != "Unsqueeze":
        return None
    gathered = uncast(others[0].inputs[0])
    rows = None if gathered is None else gathered.producer()
    if rows is None or rows.op_type != "Gather" or rows.inputs[1] is not gather.inputs[1]:
        return None
    return None if attribute_of(rows, "axis", 0) or attribute_of(gather, "axis", 0) else rows.inputs[0]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = list(value.consumers())
    return readers[0] if [reader.op_type for reader in readers] == [op_type] else None


def _by_block(gather: ir.Node, codes: ir.Value, scales: ir.TensorProtocol) -> Iterator[Violation]:
    rows, width = codes.shape.numpy() if codes.shape is not None else (0, 0)
    expected, found = (rows, width // EMBEDDING_BLOCK), tuple(scales.shape.numpy())
    if scales.dtype not in _TYPES:
        yield Violation(name_of(gather), f"has scales of type {scales.dtype.name}", "store them as float32 or float16")
    if found != expected:
        remedy = f"store one scale per {EMBEDDING_BLOCK} values of a row"
        yield Violation(name_of(gather), f"has scales of shape {list(found)}, not {list(expected)}", remedy)
    if problem := unusable(scales.numpy()):
        yield Violation(name_of(gather), f"has {problem}", "quantize the embedding again")


def _head(reader: ir.Node, scales: ir.Value) -> Iterator[Violation]:
    """Check what reads the codes besides the Gather: the Transpose and DQ of a tied head."""
    dq = _only_reader(reader.outputs[0], DQ)
    if reader.op_type != "Transpose" or dq is None:
        found = "reads the codes of the embedding"
        yield Violation(name_of(reader), found, "let a tied head read DQ(Transpose(codes))")
        return
    own, turned = untransposed(dq.inputs[1])
    if uncast(own) is not scales or not turned:
        yield Violation(name_of(dq), "has other scales than the rows of the embedding", "use the same tensor")
    if (attribute_of(dq, "axis", 1), attribute_of(dq, "block_size", 0)) != (0, EMBEDDING_BLOCK):
        remedy = f"set axis=0 and block_size={EMBEDDING_BLOCK}"
        yield Violation(name_of(dq), "does not scale the embedding by its blocks", remedy)


EMBEDDING_CODES = Rule("embedding-codes", _subjects, _check)
