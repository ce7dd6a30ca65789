"""Rule standard-operators: only operators of the standard domain, and none that TensorRT rejects."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph, name_of

REJECTED = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})


def _subjects(graph: QuantizedGraph) -> list[ir.Function | ir.Node]:
    return [*graph.model.functions.values(), *graph.nodes]


def _check(graph: QuantizedGraph, subject: ir.Function | ir.Node) -> Iterator[Violation]:
    if isinstance(subject, ir.Function):
        yield Violation(subject.name, "is a local function", "write its nodes into the graph")
    elif subject.domain != "":
        where = f"is {subject.domain}::{subject.op_type}"
        yield Violation(name_of(subject), where, "use operators of the standard domain")
    elif subject.op_type in REJECTED:
        remedy = "use QuantizeLinear and DequantizeLinear around MatMul"
        yield Violation(name_of(subject), f"is {subject.op_type}", remedy)


STANDARD_OPERATORS = Rule("standard-operators", _subjects, _check)
