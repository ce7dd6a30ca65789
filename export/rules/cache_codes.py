"""Rule cache-codes: an INT8 cache is int8 from past to present; one Q appends to it, one DQ of equal scale reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.cached_tensor import CachedTensor
from cushion_deploy.export.rules.positive_scale import unusable
from cushion_deploy.export.rules.quantized_graph import DQ, QuantizedGraph, attribute_of, name_of, stored


def _subjects(graph: QuantizedGraph) -> list[ir.Value | CachedTensor]:
    known = {tensor.present.name for tensor in graph.cached if tensor.present is not None}
    outputs = [v for v in graph.model.graph.outputs if v.dtype == ir.DataType.INT8 and v.name not in known]
    return [*outputs, *graph.cached]


def _check(graph: QuantizedGraph, subject: ir.Value | CachedTensor) -> Iterator[Violation]:
    if isinstance(subject, ir.Value):
        found = "is int8, and not part of an INT8 cache"
        yield Violation(f"output {subject.name}", found, "keep it in floating point")
        return
    q, present, past = subject.quantizer, subject.present, subject.past
    if q is None or present is None or past is None or not subject.joined:
        yield Violation(subject.site, "is not joined to its past", "write Concat(past, Q(new)) as the present")
        return
    for end in (past, present):
        if end.dtype != ir.DataType.INT8:
            yield Violation(subject.site, f"keeps {end.name} as {end.dtype}", "declare it as int8")
    if [reader.op_type for reader in subject.readers] != [DQ]:
        kinds = ", ".join(reader.op_type for reader in subject.readers) or "nothing"
        yield Violation(subject.site, f"is read by {kinds}, expected one {DQ}", "let attention read DQ(present)")
        return
    heads = present.shape[1] if present.shape is not None else None
    yield from _scales(q, subject.readers[0], heads)


def _scales(q: ir.Node, dq: ir.Node, heads: Any) -> Iterator[Violation]:
    scales = [stored(node.inputs[1]) for node in (q, dq)]
    for node, scale in zip((q, dq), scales, strict=True):
        if scale is None:
            yield Violation(name_of(node), "takes its scale from a computed value or a graph input", "store the scale")
        elif scale.dtype != ir.DataType.FLOAT:
            yield Violation(name_of(node), f"has a scale of type {scale.dtype.name}", "store the scale as float32")
        elif tuple(scale.shape.numpy()) not in ((), (heads,)) or (
            len(scale.shape) and attribute_of(node, "axis", 1) != 1
        ):
            yield Violation(name_of(node), "has a scale along another axis than the heads", "use a scalar, or axis=1")
        elif problem := unusable(scale.numpy()):
            yield Violation(name_of(node), f"has {problem}", "calibrate the cache again")
    first, second = scales
    if first is not None and second is not None and not np.array_equal(first.numpy(), second.numpy()):
        yield Violation(name_of(dq), f"has another scale than {name_of(q)}", "use one scale for both")


CACHE_CODES = Rule("cache-codes", _subjects, _check)
