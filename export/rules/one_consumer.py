"""Rule one-consumer: every Q feeds one DQ and nothing else, and that DQ feeds products only."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import DQ, PRODUCTS, Q, QuantizedGraph, name_of


def _subjects(graph: QuantizedGraph) -> list[ir.Node]:
    quantizers = [node for node in graph.of(Q) if node not in graph.cache_nodes]
    return [*quantizers, *(node for node in graph.activations if node.op_type == DQ)]


def _check(graph: QuantizedGraph, node: ir.Node) -> Iterator[Violation]:
    users = node.outputs[0].consumers()
    kinds = [user.op_type for user in users]
    if node.op_type == Q:
        kinds += ["graph output"] * node.outputs[0].is_graph_output()
        if kinds != [DQ]:
            yield Violation(
                name_of(node),
                f"has consumers {', '.join(kinds) or '(none)'}, expected one {DQ}",
                "pack the linears that share this input into one MatMul",
            )
    elif not set(kinds) <= PRODUCTS or not kinds:
        others = [kind for kind in kinds if kind not in PRODUCTS]
        yield Violation(name_of(node), f"feeds {', '.join(others) or 'nothing'}", "let it feed one MatMul")


ONE_CONSUMER = Rule("one-consumer", _subjects, _check)
