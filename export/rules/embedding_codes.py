"""Rule embedding-codes: an INT8 embedding is stored once, with one positive scale per row for all readers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.positive_scale import unusable
from cushion_deploy.export.rules.quantized_graph import DQ, QuantizedGraph, attribute_of, name_of, stored


def _subjects(graph: QuantizedGraph) -> list[ir.Node | None]:
    return [*graph.row_gathers, *graph.table_dqs] or [None] * graph.int8_embedding


def _check(graph: QuantizedGraph, gather: ir.Node | None) -> Iterator[Violation]:
    """Check the Gather that reads codes, or the DQ of a whole table, of which a graph for TensorRT gathers rows."""
    if gather is None:
        yield Violation("the embedding", "is not stored as INT8 codes", "gather its rows from int8 codes")
        return
    whole = gather.op_type == DQ
    if whole and attribute_of(gather, "axis", 1) != 0:
        yield Violation(name_of(gather), "has no scale per row", "set axis=0")
    codes, scales = gather.inputs[0], gather.inputs[1] if whole else _scales(gather)
    tensor = stored(scales)
    if codes is None or tensor is None:
        found = "is not multiplied by a stored scale of the same row"
        yield Violation(name_of(gather), found, "write Mul(Cast(Gather(codes, ids)), Gather(scales, ids))")
        return
    yield from _per_row(gather, codes, tensor)
    for reader in codes.consumers():
        if reader is not gather:
            yield from _head(reader, tensor)
    for other in graph.model.graph.initializers.values():
        if other is not codes and other.shape == codes.shape:
            yield Violation(f"initializer {other.name}", "stores the embedding a second time", "remove it")


def _scales(gather: ir.Node) -> ir.Value | None:
    """Return the value whose rows, of the same ids, multiply the gathered codes; None if nothing does."""
    cast = _only_reader(gather.outputs[0], "Cast")
    product = _only_reader(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or product is None or attribute_of(cast, "to", 0) != ir.DataType.FLOAT:
        return None
    others = [value.producer() for value in product.inputs if value is not None and value is not cast.outputs[0]]
    if len(others) != 1 or others[0] is None or others[0].op_type != "Gather":
        return None
    column, ids = others[0].inputs
    if ids is not gather.inputs[1] or attribute_of(others[0], "axis", 0) or attribute_of(gather, "axis", 0):
        return None
    source = column.producer() if column is not None else None
    return source.inputs[0] if source is not None and source.op_type == "Reshape" else column


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = list(value.consumers())
    return readers[0] if [reader.op_type for reader in readers] == [op_type] else None


def _per_row(gather: ir.Node, codes: ir.Value, scales: ir.TensorProtocol) -> Iterator[Violation]:
    rows = codes.shape[0] if codes.shape is not None else 0
    if scales.dtype != ir.DataType.FLOAT:
        yield Violation(name_of(gather), f"has scales of type {scales.dtype.name}", "store the scales as float32")
    if scales.size != rows:
        yield Violation(name_of(gather), f"has {scales.size} scales for {rows} rows", "store one scale per row")
    if problem := unusable(scales.numpy()):
        yield Violation(name_of(gather), f"has {problem}", "quantize the embedding again")


def _head(reader: ir.Node, scales: ir.TensorProtocol) -> Iterator[Violation]:
    """Check what reads the codes besides the Gather: the Transpose and DQ of a tied head."""
    dq = _only_reader(reader.outputs[0], DQ)
    if reader.op_type != "Transpose" or dq is None:
        found = "reads the codes of the embedding"
        yield Violation(name_of(reader), found, "let a tied head read DQ(Transpose(codes))")
        return
    own = stored(dq.inputs[1])
    if own is None or not np.array_equal(own.numpy().ravel(), scales.numpy().ravel()):
        yield Violation(name_of(dq), "has other scales than the rows of the embedding", "use the same tensor")
    if attribute_of(dq, "axis", 1) != 1:
        yield Violation(name_of(dq), "scales the contracting axis 0", "set axis=1: one scale per row of the embedding")


EMBEDDING_CODES = Rule("embedding-codes", _subjects, _check)
