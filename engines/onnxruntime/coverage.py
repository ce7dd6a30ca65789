"""Count the linears that ONNX Runtime runs in INT8, from the graph as it optimizes it.

The fast path is ``MatMulIntegerToFloat`` on uint8 activations. ONNX Runtime fuses it from Q/DQ nodes whose Q has one
consumer; a graph that is not fused runs slower than float32 without any message, so the optimized graph is read back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.external_data import read_graph
from cushion_deploy.engines.onnxruntime.settings import CPU, import_onnxruntime, session_options
from cushion_deploy.store.files import require_space, temporary_folder

_ATTENTION = ("MultiHeadAttention", "GroupQueryAttention", "Attention")
_INTEGER_MATMUL = "MatMulIntegerToFloat"


@dataclass
class Coverage:
    """What the optimized graph runs in INT8.

    Attributes:
        int8: Sites whose MatMul was fused into the integer kernel on a uint8 activation.
        left: nodes that were not fused and Sites without a fused node, each with the reason.
        kernels: operator types of the optimized graph, counted.
        rewritten: weights that were stored as uint8 with zero point 128.
        changed: Sites whose stored weight does not hold the same codes; an error if there is any.
    """

    int8: set[Site] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    rewritten: int = 0
    changed: list[str] = field(default_factory=list)

    @property
    def integer_matmuls(self) -> int:
        """Matrix products fused into the integer kernel."""
        return self.kernels[_INTEGER_MATMUL]

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels."""
        return sum(self.kernels[op] for op in _ATTENTION)


def read_coverage(graph: ExportedGraph) -> Coverage:
    """Optimize a graph as a session on this machine would, and count what became INT8.

    Raises:
        MissingDependency: onnxruntime is not installed.
        UsageError: too little disk space for the optimized graph.
        UntrustedArtifact: the graph reads tensors from elsewhere than beside it.
    """
    import onnx_ir as ir

    ort, canonical = import_onnxruntime(), read_graph(graph.path)
    with temporary_folder("cushion-ort-") as folder:
        require_space(folder, 2 * graph.size)
        options = session_options()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        ort.InferenceSession(str(graph.path), options, providers=[CPU.name])
        sites = set(graph.sites) if graph.quantized else set()
        return _count(ir.load(folder / "optimized.onnx"), canonical, sites)


def _count(optimized: Any, canonical: Any, sites: set[Site]) -> Coverage:
    coverage = Coverage()
    values, original = optimized.graph.initializers, canonical.graph
    for node in optimized.graph:
        coverage.kernels[node.op_type] += 1
        if node.op_type == _INTEGER_MATMUL:
            _count_integer_matmul(node, values, original, sites, coverage)
        elif node.op_type == "MatMul" and any(_is_dequantized(value) for value in node.inputs):
            coverage.left.append(f"{node.name}: DequantizeLinear -> MatMul was not fused")
    coverage.left += [f"{site}: not in the integer kernel" for site in sorted(sites - coverage.int8)]
    return coverage


def _count_integer_matmul(node: Any, values: Any, original: Any, sites: set[Site], coverage: Coverage) -> None:
    weight, zero_point = node.inputs[1].name, node.inputs[4]
    site = Site(weight.split(".weight_codes")[0])
    if site not in sites:
        coverage.left.append(f"{node.name}: weight {weight} belongs to no Site")
        return
    known = zero_point is not None and zero_point.name in values
    if not known or values[zero_point.name].const_value.numpy().dtype != np.uint8:
        coverage.left.append(f"{node.name}: activation is not uint8")
        return
    coverage.int8.add(site)
    if weight != f"{site}.weight_codes":
        coverage.rewritten += 1
        before = original.initializers[f"{site}.weight_codes"].const_value.numpy().astype(np.int16)
        after = values[weight].const_value.numpy().astype(np.int16) - 128
        if not np.array_equal(before, after):
            coverage.changed.append(site)


def _is_dequantized(value: Any) -> bool:
    """Return whether an operand comes from a DQ node that should have been fused."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    # Attention dequantizes an INT8 cache on purpose: there the codes are a graph output, possibly transposed.
    codes = producer.inputs[0]
    if (transpose := codes.producer()) is not None and transpose.op_type == "Transpose":
        codes = transpose.inputs[0]
    return not codes.is_graph_output()
