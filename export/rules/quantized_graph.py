"""A finished graph as the rules see it: quantized products, weights, activations, parts of an INT8 cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from cushion_deploy.core.sites import Site
from cushion_deploy.export.rules.cached_tensor import CachedTensor

Q, DQ = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = frozenset({"MatMul", "Gemm"})
MOVERS = frozenset(
    {"Cast", "Concat", "Expand", "Identity", "Mul", "Reshape", "Slice", "Split", "Squeeze", "TensorScatter"}
    | {"Transpose", "Unsqueeze"}
)
"""Operators that only move, scale or cast data: attention that reads a DQ through them is quantized all the same."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized product, and the DQ that its weight goes through."""

    product: ir.Node
    dq: ir.Node


@dataclass(frozen=True)
class QuantizedGraph:
    """A model and what is expected of it, sorted for the rules.

    Attributes:
        model: the graph as it was read back from disk.
        sites: Sites that must be quantized.
        cache: names of the tensors that must enter an INT8 cache.
        scale_dtype: type that all scales of linears must have.
        int8_embedding: whether the token embedding must be stored as INT8 codes.
    """

    model: ir.Model
    sites: frozenset[Site]
    cache: frozenset[Site] = frozenset()
    scale_dtype: ir.DataType = ir.DataType.FLOAT
    int8_embedding: bool = False

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """Every node, nodes of subgraphs included."""
        return list(ir.traversal.RecursiveGraphIterator(self.model.graph))

    def of(self, *op_types: str) -> list[ir.Node]:
        """Return the nodes of the given operators of the standard domain."""
        return [node for node in self.nodes if node.op_type in op_types and node.domain == ""]

    @cached_property
    def products(self) -> list[ir.Node]:
        """The quantized linears: products outside of attention with a DQ on at least one operand."""
        found = [node for node in self.of(*PRODUCTS) if not is_attention(node) and any(map(dq_of, node.inputs[:2]))]
        return [node for node in found if not self._is_tied_head(node)]

    @cached_property
    def row_gathers(self) -> list[ir.Node]:
        """Every Gather of stored INT8 codes: an INT8 embedding has one."""
        gathers = [(node, stored(node.inputs[0])) for node in self.of("Gather")]
        return [node for node, tensor in gathers if tensor is not None and tensor.dtype == ir.DataType.INT8]

    def _is_tied_head(self, product: ir.Node) -> bool:
        """Whether a product of a floating-point activation reads the codes of the embedding."""
        dq, rows = dq_of(product.inputs[1]), {node.inputs[0] for node in self.row_gathers}
        if dq is None or dq_of(product.inputs[0]) is not None:
            return False
        return untransposed(dq.inputs[0])[0] in rows

    @cached_property
    def weights(self) -> list[QuantizedWeight]:
        """The weight of each quantized product whose weight goes through a DQ."""
        return [QuantizedWeight(node, dq) for node in self.products if (dq := dq_of(node.inputs[1])) is not None]

    @cached_property
    def weight_shapes(self) -> frozenset[tuple[int, ...]]:
        """Shapes of the stored weights, and of their transposes."""
        shapes = {shape for weight in self.weights if (shape := shape_of_codes(weight.dq)) is not None}
        return frozenset(shapes | {shape[::-1] for shape in shapes})

    @cached_property
    def quantized_names(self) -> frozenset[str | None]:
        """Names of the tensors that a Q writes."""
        return frozenset(node.outputs[0].name for node in self.of(Q))

    @cached_property
    def activations(self) -> list[ir.Node]:
        """Every Q, and every DQ that does not read a stored tensor; without those of the cache."""
        nodes = [n for n in self.of(Q, DQ) if n not in self.cache_nodes]
        return [n for n in nodes if n.op_type == Q or stored(untransposed(n.inputs[0])[0]) is None]

    @cached_property
    def cached(self) -> list[CachedTensor]:
        """Every expected part of the INT8 cache, complete or not."""
        return [CachedTensor.find(self.model.graph, site) for site in sorted(self.cache)]

    @cached_property
    def cache_nodes(self) -> frozenset[ir.Node]:
        """Q and DQ of the cache."""
        return frozenset(node for tensor in self.cached for node in tensor.nodes)


def name_of(node: ir.Node) -> str:
    """Return the name of a node, or a description of a node without one."""
    return node.name or f"(unnamed {node.op_type})"


def attribute_of(node: ir.Node, attribute: str, default: int) -> int:
    """Return an integer attribute of a node."""
    found = node.attributes.get(attribute)
    return default if found is None else found.as_int()


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a constant value; None for any other, and for an initializer that a caller may override."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def uncast(value: ir.Value | None) -> ir.Value | None:
    """Return the value behind a Cast, or the value itself if there is none."""
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value


def untransposed(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """Return the value behind a Transpose, and whether there is one."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Transpose":
        return value, False
    return producer.inputs[0], True


def shape_of_codes(dq: ir.Node) -> tuple[int, ...] | None:
    """Return the shape in which a DQ reads stored codes, possibly through a Transpose; None if they are not stored."""
    value, turned = untransposed(dq.inputs[0])
    if (tensor := stored(value)) is None:
        return None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return shape[::-1] if turned else shape


def dq_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DQ that computes a value; None where another operator does."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == DQ and producer.domain == "" else None


def is_attention(node: ir.Node) -> bool:
    """Whether both operands of a product are computed: neither is stored, nor derived from a stored weight."""
    return not any(_is_derived_from_stored(value) for value in node.inputs[:2])


def _is_derived_from_stored(value: ir.Value | None) -> bool:
    while value is not None:
        if stored(value) is not None:
            return True
        producer = value.producer()
        if producer is None or producer.op_type not in {DQ, Q, "Transpose", "Cast", "Identity", "Reshape"}:
            return False
        value = producer.inputs[0]
    return False


def dq_above(value: ir.Value | None, besides: Collection[ir.Node] = ()) -> ir.Node | None:
    """Return a Q or DQ, other than ``besides``, whose result reaches a value through ``MOVERS`` alone; None if none."""
    pending, seen = [value], set[str]()
    while pending:
        producer = None if (current := pending.pop()) is None else current.producer()
        if producer is None or producer in besides or name_of(producer) in seen:
            continue
        seen.add(name_of(producer))
        if producer.op_type in (Q, DQ):
            return producer
        if producer.op_type in MOVERS:
            pending.extend(producer.inputs)
    return None
