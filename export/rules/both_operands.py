"""Rule both-operands: a quantized product has both operands behind a DQ, the activation from a Q, the weight stored."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import Q, QuantizedGraph, dq_of, name_of


def _subjects(graph: QuantizedGraph) -> list[ir.Node]:
    return graph.products


def _check(graph: QuantizedGraph, node: ir.Node) -> Iterator[Violation]:
    for side, value in zip(("first", "second"), node.inputs[:2], strict=True):
        if dq_of(value) is None:
            found = f"has its {side} operand in floating point"
            yield Violation(name_of(node), found, "put DQ on both operands or on none")
    dq = dq_of(node.inputs[0])
    source = dq.inputs[0].producer() if dq is not None and dq.inputs[0] is not None else None
    if dq is not None and (source is None or source.op_type != Q):
        yield Violation(name_of(node), "has an activation that no Q wrote", "put Q and DQ on its input")


BOTH_OPERANDS = Rule("both-operands", _subjects, _check)
