"""Rule activation-scales: the scale of an activation is one stored, positive scalar, the same on Q and DQ."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.positive_scale import unusable
from cushion_deploy.export.rules.quantized_graph import DQ, Q, QuantizedGraph, name_of, stored


def _subjects(graph: QuantizedGraph) -> list[ir.Node]:
    return graph.activations


def _check(graph: QuantizedGraph, node: ir.Node) -> Iterator[Violation]:
    tensor = stored(node.inputs[1])
    if tensor is None:
        yield Violation(name_of(node), "takes its scale from a computed value or a graph input", "store the scale")
        return
    if tensor.dtype != graph.scale_dtype:
        remedy = f"store the scale as {graph.scale_dtype.name}"
        yield Violation(name_of(node), f"has a scale of type {tensor.dtype.name}", remedy)
    if len(tensor.shape) != 0:
        shape = list(tensor.shape.numpy())
        yield Violation(name_of(node), f"has a scale of shape {shape}", "use one scalar scale for the whole tensor")
    if problem := unusable(tensor.numpy()):
        yield Violation(name_of(node), f"has {problem}", "calibrate this Site again")
    source = node.inputs[0].producer() if node.inputs[0] else None
    if node.op_type == DQ and source is not None and source.op_type == Q:
        other = stored(source.inputs[1])
        if other is not None and not np.array_equal(other.numpy(), tensor.numpy()):
            yield Violation(name_of(node), f"has another scale than {name_of(source)}", "use one scale for both")


ACTIVATION_SCALES = Rule("activation-scales", _subjects, _check)
