"""Rule zero-points: every Q and DQ is INT8 with a stored zero point of 0."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import DQ, Q, QuantizedGraph, name_of, stored

REMEDY = "store an int8 zero point of 0: TensorRT runs symmetric INT8 only"


def _subjects(graph: QuantizedGraph) -> list[ir.Node]:
    return graph.of(Q, DQ)


def _check(graph: QuantizedGraph, node: ir.Node) -> Iterator[Violation]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        if node.op_type == Q:
            yield Violation(name_of(node), "has no zero point and quantizes to uint8", REMEDY)
        return
    tensor = _constant(zero)
    if tensor is None:
        yield Violation(name_of(node), f"computes its zero point '{zero.name}'", REMEDY)
    elif tensor.dtype != ir.DataType.INT8:
        yield Violation(name_of(node), f"has a zero point of type {tensor.dtype.name}", REMEDY)
    elif tensor.numpy().any():
        worst = int(np.abs(tensor.numpy().astype(np.int64)).max())
        yield Violation(name_of(node), f"has a zero point other than 0 (up to {worst} in magnitude)", REMEDY)


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of a stored value, or the one element that a ConstantOfShape repeats."""
    producer = value.producer()
    if producer is None or producer.op_type != "ConstantOfShape" or "value" not in producer.attributes:
        return stored(value)
    return producer.attributes["value"].as_tensor()


ZERO_POINTS = Rule("zero-points", _subjects, _check)
