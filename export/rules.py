"""Rules that the finished graph must obey so that TensorRT and ONNX Runtime run its linears in INT8.

TensorRT rejects some violations and quietly drops INT8 for others; a checker of the ONNX format sees none of them.
Every rule is a function that yields violations; all are run, and all violations are told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.linear import codes_name
from cushion_deploy.export.quantized_graph import (
    DQ,
    PRODUCTS,
    Q,
    QuantizedGraph,
    attribute_of,
    dq_above,
    dq_of,
    is_attention,
    name_of,
    stored,
)

REJECTED = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Violation:
    """One broken rule: where, what was found there, what to do."""

    node: str
    found: str
    remedy: str

    def __str__(self) -> str:
        """Put the three into one line."""
        return f"{self.node}: {self.found}; {self.remedy}"


Rule = Callable[[QuantizedGraph], Iterator[Violation]]


def check_graph(
    model: ir.Model,
    sites: set[Site],
    cache: Collection[Site] = (),
    scale_dtype: ir.DataType = ir.DataType.FLOAT,
) -> list[str]:
    """Check a finished graph against every rule.

    Args:
        model: the graph as it was read back from disk; weights themselves are not read.
        sites: Sites that must be quantized, no more and no fewer.
        scale_dtype: type that all scales must have.
        cache: names of what must enter an INT8 cache, such as ``layers.3.kv.key``; empty for one in floating point.

    Returns:
        Names of the rules that were checked and hold.

    Raises:
        CheckFailed: the message lists every violation with node, finding and remedy.
    """
    graph = QuantizedGraph(model, frozenset(sites), frozenset(cache), scale_dtype)
    broken = [f"[{name}] {violation}" for name, rule in RULES.items() for violation in rule(graph)]
    if broken:
        raise CheckFailed(
            f"the graph breaks {len(broken)} INT8 rules:\n" + "\n".join(broken),
            hint="this is a fault of the exporter or of a later edit; follow the remedy behind each violation",
        )
    return list(RULES)


def standard_operators(graph: QuantizedGraph) -> Iterator[Violation]:
    """Only operators of the standard domain, and none that TensorRT rejects."""
    for function in graph.model.functions.values():
        yield Violation(function.name, "is a local function", "write its nodes into the graph")
    for node in graph.nodes:
        if node.domain != "":
            yield Violation(name_of(node), f"is {node.domain}::{node.op_type}", "use operators of the standard domain")
        elif node.op_type in REJECTED:
            yield Violation(
                name_of(node), f"is {node.op_type}", "use QuantizeLinear and DequantizeLinear around MatMul"
            )


def sites_exactly(graph: QuantizedGraph) -> Iterator[Violation]:
    """Exactly the given Sites, and parts of the cache, have a Q."""
    expected = {codes_name(site): site for site in graph.sites | graph.cache}
    found: dict[str, ir.Node] = {}
    for node in graph.of(Q):
        name = node.outputs[0].name or ""
        if name in expected:
            found[name] = node
        else:
            yield Violation(
                name_of(node), f"quantizes to '{name}', which is no Site's tensor", "quantize at Sites only"
            )
    for name in sorted(expected.keys() - found.keys()):
        yield Violation(f"Site {expected[name]}", f"has no {Q} writing '{name}'", "add Q and DQ before its MatMul")


def one_consumer(graph: QuantizedGraph) -> Iterator[Violation]:
    """Every Q feeds one DQ and nothing else, and that DQ feeds products only."""
    for node in graph.of(Q):
        if node in graph.cache_nodes:
            continue
        users = node.outputs[0].consumers()
        kinds = [user.op_type for user in users] + ["graph output"] * node.outputs[0].is_graph_output()
        if kinds != [DQ]:
            yield Violation(
                name_of(node),
                f"has consumers {', '.join(kinds) or '(none)'}, expected one {DQ}",
                "pack the linears that share this input into one MatMul",
            )
    for node in graph.activations:
        if node.op_type != DQ:
            continue
        others = [u for u in node.outputs[0].consumers() if u.op_type not in PRODUCTS]
        if others or not node.outputs[0].consumers():
            kinds = [user.op_type for user in others]
            yield Violation(name_of(node), f"feeds {', '.join(kinds) or 'nothing'}", "let it feed one MatMul")


def zero_points(graph: QuantizedGraph) -> Iterator[Violation]:
    """INT8 with zero point 0 everywhere."""
    remedy = "store an int8 zero point of 0: TensorRT runs symmetric INT8 only"
    for node in graph.of(Q, DQ):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None:
            if node.op_type == Q:
                yield Violation(name_of(node), "has no zero point and quantizes to uint8", remedy)
            continue
        tensor = stored(zero)
        if tensor is None:
            yield Violation(name_of(node), f"computes its zero point '{zero.name}'", remedy)
        elif tensor.dtype != ir.DataType.INT8:
            yield Violation(name_of(node), f"has a zero point of type {tensor.dtype.name}", remedy)
        elif tensor.numpy().any():
            worst = int(np.abs(tensor.numpy().astype(np.int64)).max())
            yield Violation(name_of(node), f"has a zero point other than 0 (up to {worst} in magnitude)", remedy)


def activation_scales(graph: QuantizedGraph) -> Iterator[Violation]:
    """The scale of an activation is one stored scalar, the same on Q and DQ."""
    for node in graph.activations:
        tensor = stored(node.inputs[1])
        if tensor is None:
            yield Violation(name_of(node), "takes its scale from a computed value or a graph input", "store the scale")
            continue
        if tensor.dtype != graph.scale_dtype:
            remedy = f"store the scale as {graph.scale_dtype.name}"
            yield Violation(name_of(node), f"has a scale of type {tensor.dtype.name}", remedy)
        if len(tensor.shape) != 0:
            shape = list(tensor.shape.numpy())
            yield Violation(name_of(node), f"has a scale of shape {shape}", "use one scalar scale for the whole tensor")
        if problem := _unusable(tensor.numpy()):
            yield Violation(name_of(node), f"has {problem}", "calibrate this Site again")
        source = node.inputs[0].producer() if node.inputs[0] else None
        if node.op_type == DQ and source is not None and source.op_type == Q:
            other = stored(source.inputs[1])
            if other is not None and not np.array_equal(other.numpy(), tensor.numpy()):
                yield Violation(name_of(node), f"has another scale than {name_of(source)}", "use one scale for both")


def weight_codes(graph: QuantizedGraph) -> Iterator[Violation]:
    """A quantized weight is stored as int8 ``[in, out]``, never quantized inside the graph."""
    for _, dq in graph.weights:
        tensor = stored(dq.inputs[0])
        if tensor is None:
            yield Violation(name_of(dq), "reads a weight that is not stored", "store the codes as an int8 initializer")
        elif tensor.dtype != ir.DataType.INT8:
            yield Violation(name_of(dq), f"reads a weight of type {tensor.dtype.name}", "store the codes as int8")
        elif len(tensor.shape) != 2:
            yield Violation(name_of(dq), f"reads a weight of {len(tensor.shape)} dimensions", "store it as [in, out]")


def weight_scales(graph: QuantizedGraph) -> Iterator[Violation]:
    """The scale of a weight is stored, one for each output channel, along the output axis."""
    for product, dq in graph.weights:
        codes, scale = stored(dq.inputs[0]), stored(dq.inputs[1])
        if scale is None:
            yield Violation(name_of(dq), "takes its scale from a computed value or a graph input", "store the scales")
            continue
        if scale.dtype != graph.scale_dtype:
            remedy = f"store the scales as {graph.scale_dtype.name}"
            yield Violation(name_of(dq), f"has scales of type {scale.dtype.name}", remedy)
        output_axis = 0 if attribute_of(product, "transB", 0) else 1
        if len(scale.shape) != 1:
            yield Violation(name_of(dq), f"has a scale of {len(scale.shape)} dimensions", "use one per output channel")
        elif codes is not None and len(codes.shape) == 2:
            axis = attribute_of(dq, "axis", 1) % 2
            length, expected = scale.shape[0], codes.shape[output_axis]
            if axis != output_axis:
                remedy = f"set axis={output_axis}: TensorRT drops INT8 without a word"
                yield Violation(name_of(dq), f"scales the contracting axis {axis}", remedy)
            elif length != expected:
                yield Violation(
                    name_of(dq), f"has {length} scales for {expected} output channels", "store one for each"
                )
        if problem := _unusable(scale.numpy()):
            yield Violation(name_of(dq), f"has {problem}", "quantize this weight again")


def both_operands(graph: QuantizedGraph) -> Iterator[Violation]:
    """A product with one operand behind a DQ has both behind one: activation from a Q, weight stored."""
    for node in graph.products:
        for side, value in zip(("first", "second"), node.inputs[:2], strict=True):
            if dq_of(value) is None:
                yield Violation(
                    name_of(node), f"has its {side} operand in floating point", "put DQ on both operands or on none"
                )
        dq = dq_of(node.inputs[0])
        source = dq.inputs[0].producer() if dq is not None and dq.inputs[0] is not None else None
        if dq is not None and (source is None or source.op_type != Q):
            yield Violation(name_of(node), "has an activation that no Q wrote", "put Q and DQ on its input")


def float_attention(graph: QuantizedGraph) -> Iterator[Violation]:
    """No attention has Q/DQ on an input, as two MatMul or as one operator: it would break the fused kernel."""
    for node in graph.of("MatMul", "Attention"):
        if not is_attention(node):
            continue
        for value in node.inputs:
            if (dq := dq_above(value, graph.cache_nodes)) is not None:
                yield Violation(name_of(node), f"reads {name_of(dq)}", "leave attention in floating point")


def cache_codes(graph: QuantizedGraph) -> Iterator[Violation]:
    """An INT8 cache is int8 from past to present: new codes are joined to it, and one DQ of equal scale reads it."""
    known = {tensor.present.name for tensor in graph.cached if tensor.present is not None}
    for value in graph.model.graph.outputs:
        if value.dtype == ir.DataType.INT8 and value.name not in known:
            yield Violation(f"output {value.name}", "is int8, and no part of an INT8 cache", "keep it in float")
    for tensor in graph.cached:
        q, present, past = tensor.quantizer, tensor.present, tensor.past
        if q is None or present is None or past is None or not tensor.joined:
            yield Violation(tensor.site, "is not joined to its past", "write Concat(past, Q(new)) as the present")
            continue
        for end in (past, present):
            if end.dtype != ir.DataType.INT8:
                yield Violation(tensor.site, f"keeps {end.name} as {end.dtype}", "declare it as int8")
        if [reader.op_type for reader in tensor.readers] != [DQ]:
            kinds = ", ".join(reader.op_type for reader in tensor.readers) or "nothing"
            yield Violation(tensor.site, f"is read by {kinds}, expected one {DQ}", "let attention read DQ(present)")
            continue
        heads = present.shape[1] if present.shape is not None else None
        yield from _cache_scale(q, tensor.readers[0], heads)


def _cache_scale(q: ir.Node, dq: ir.Node, heads: Any) -> Iterator[Violation]:
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
        elif problem := _unusable(scale.numpy()):
            yield Violation(name_of(node), f"has {problem}", "calibrate the cache again")
    first, second = scales
    if first is not None and second is not None and not np.array_equal(first.numpy(), second.numpy()):
        yield Violation(name_of(dq), f"has another scale than {name_of(q)}", "use one scale for both")


def no_float_twin(graph: QuantizedGraph) -> Iterator[Violation]:
    """No quantized weight is stored a second time in floating point."""
    shapes = {tuple(codes.shape.numpy()) for _, dq in graph.weights if (codes := stored(dq.inputs[0])) is not None}
    shapes |= {shape[::-1] for shape in shapes}
    twins = {f"{site}.weight" for site in graph.sites}
    for name, value in graph.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        unused = not value.consumers() and not value.is_graph_output()
        if name in twins or (unused and tuple(tensor.shape.numpy()) in shapes):
            yield Violation(f"initializer {name}", "stores a quantized weight in floating point", "remove it")


RULES: dict[str, Rule] = {
    "standard-operators": standard_operators,
    "sites-exactly": sites_exactly,
    "one-consumer": one_consumer,
    "zero-points": zero_points,
    "activation-scales": activation_scales,
    "weight-codes": weight_codes,
    "weight-scales": weight_scales,
    "both-operands": both_operands,
    "float-attention": float_attention,
    "cache-codes": cache_codes,
    "no-float-twin": no_float_twin,
}


def _unusable(scales: npt.NDArray[np.generic]) -> str | None:
    """Return what is wrong with scales, or None: they must be finite, positive and not subnormal in float32."""
    values = scales.astype(np.float64)
    if not np.isfinite(values).all():
        return "a scale that is NaN or infinite"
    if (values <= 0).any():
        return f"a scale of {float(values.min())}, which is not positive"
    if (values < TINY).any():
        return f"a subnormal scale of {float(values.min()):.3g}"
    return None
