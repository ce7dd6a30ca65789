"""Rule weight-codes: a quantized weight is stored as int8 ``[in, out]``, not quantized inside the graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph, QuantizedWeight, name_of, stored, untransposed


def _subjects(graph: QuantizedGraph) -> list[QuantizedWeight]:
    return graph.weights


def _check(graph: QuantizedGraph, weight: QuantizedWeight) -> Iterator[Violation]:
    tensor = stored(untransposed(weight.dq.inputs[0])[0])
    if tensor is None:
        yield Violation(name_of(weight.dq), "reads a weight that is not stored", "store the codes as int8 initializer")
    elif tensor.dtype != ir.DataType.INT8:
        yield Violation(name_of(weight.dq), f"reads a weight of type {tensor.dtype.name}", "store the codes as int8")
    elif len(tensor.shape) != 2:
        found = f"reads a weight of {len(tensor.shape)} dimensions"
        yield Violation(name_of(weight.dq), found, "store it as [in, out]")


WEIGHT_CODES = Rule("weight-codes", _subjects, _check)
