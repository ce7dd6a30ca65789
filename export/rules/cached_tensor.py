"""Keys or values of one layer in a finished graph with an INT8 cache: the nodes that write and read them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cushion_deploy.core.sites import Site
from cushion_deploy.export.linear import codes_name


@dataclass(frozen=True)
class CachedTensor:
    """Keys or values of one layer; what the graph lacks is None or empty.

    Attributes:
        site: such as ``layers.3.kv.key``.
        quantizer: the node that writes the codes of new tokens.
        present: the graph output.
        joins: nodes that read those codes; in a correct graph one Concat with the past.
        readers: nodes that read the present; where its only reader is a Transpose, the nodes that read the result.
    """

    site: Site
    quantizer: ir.Node | None
    present: ir.Value | None
    joins: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]

    @classmethod
    def find(cls, graph: ir.Graph, site: Site) -> CachedTensor:
        """Return the tensor of a site, found by the names of its codes and of its present."""
        _, layer, _, part = site.split(".")
        name = codes_name(site)
        q = next((n for n in graph if n.op_type == "QuantizeLinear" and n.outputs[0].name == name), None)
        present = next((value for value in graph.outputs if value.name == f"present.{layer}.{part}"), None)
        readers = tuple(present.consumers()) if present else ()
        if [reader.op_type for reader in readers] == ["Transpose"]:
            readers = tuple(readers[0].outputs[0].consumers())
        return cls(site, q, present, tuple(q.outputs[0].consumers()) if q else (), readers)

    @property
    def past(self) -> ir.Value | None:
        """The graph input that the codes are appended to."""
        first = self.joins[0].inputs[0] if len(self.joins) == 1 else None
        return first if first is not None and first.is_graph_input() else None

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Its own Q and DQ, which the rules for linears leave out."""
        own = [node for node in self.readers if node.op_type == "DequantizeLinear"]
        return (*([self.quantizer] if self.quantizer else []), *own)

    @property
    def joined(self) -> bool:
        """Whether the only reader of the codes appends them to the past of the same name, and that is the present."""
        if self.present is None or self.past is None or len(self.joins) != 1:
            return False
        named = (self.present.name or "").replace("present", "past_key_values")
        concat = self.joins[0]
        return concat.op_type == "Concat" and concat.outputs[0] is self.present and self.past.name == named
