"""Rule float-attention: attention, as two products or one operator, reads no Q or DQ but those of the INT8 cache.

Any other would keep engines from using their fused attention kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph, dq_above, is_attention, name_of


def _subjects(graph: QuantizedGraph) -> list[ir.Node]:
    return [node for node in graph.of("MatMul", "Attention") if is_attention(node)]


def _check(graph: QuantizedGraph, node: ir.Node) -> Iterator[Violation]:
    for value in node.inputs:
        if (dq := dq_above(value, graph.cache_nodes)) is not None:
            yield Violation(name_of(node), f"reads {name_of(dq)}", "leave attention in floating point")


FLOAT_ATTENTION = Rule("float-attention", _subjects, _check)
