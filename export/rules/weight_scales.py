"""Rule weight-scales: a weight has one stored, positive scale per output channel, along the output axis."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.positive_scale import unusable
from cushion_deploy.export.rules.quantized_graph import (
    QuantizedGraph,
    QuantizedWeight,
    attribute_of,
    name_of,
    shape_of_codes,
    stored,
)


def _subjects(graph: QuantizedGraph) -> list[QuantizedWeight]:
    return graph.weights


def _check(graph: QuantizedGraph, weight: QuantizedWeight) -> Iterator[Violation]:
    name, scale = name_of(weight.dq), stored(weight.dq.inputs[1])
    if scale is None:
        yield Violation(name, "takes its scale from a computed value or a graph input", "store the scales")
        return
    if scale.dtype != graph.scale_dtype:
        remedy = f"store the scales as {graph.scale_dtype.name}"
        yield Violation(name, f"has scales of type {scale.dtype.name}", remedy)
    if len(scale.shape) != 1:
        yield Violation(name, f"has a scale of {len(scale.shape)} dimensions", "use one per output channel")
    else:
        yield from _along_output_axis(weight, scale)
    if problem := unusable(scale.numpy()):
        yield Violation(name, f"has {problem}", "quantize this weight again")


def _along_output_axis(weight: QuantizedWeight, scale: ir.TensorProtocol) -> Iterator[Violation]:
    shape = shape_of_codes(weight.dq)
    if shape is None or len(shape) != 2:
        return
    output_axis = 0 if attribute_of(weight.product, "transB", 0) else 1
    axis = attribute_of(weight.dq, "axis", 1) % 2
    length, expected = scale.shape[0], shape[output_axis]
    if axis != output_axis:
        remedy = f"set axis={output_axis}: otherwise TensorRT silently runs it in floating point"
        yield Violation(name_of(weight.dq), f"scales the contracting axis {axis}", remedy)
    elif length != expected:
        found = f"has {length} scales for {expected} output channels"
        yield Violation(name_of(weight.dq), found, "store one per output channel")


WEIGHT_SCALES = Rule("weight-scales", _subjects, _check)
