"""Rule no-float-twin: no quantized weight is stored a second time in floating point."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph


def _subjects(graph: QuantizedGraph) -> list[ir.Value]:
    return [
        value
        for value in graph.model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    ]


def _check(graph: QuantizedGraph, value: ir.Value) -> Iterator[Violation]:
    tensor, unused = value.const_value, not value.consumers() and not value.is_graph_output()
    named = value.name in {f"{site}.weight" for site in graph.sites}
    left_over = unused and tensor is not None and tuple(tensor.shape.numpy()) in graph.weight_shapes
    if named or left_over:
        yield Violation(f"initializer {value.name}", "stores a quantized weight in floating point", "remove it")


NO_FLOAT_TWIN = Rule("no-float-twin", _subjects, _check)
