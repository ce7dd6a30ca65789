"""ONNX Runtime on the CPU: runs model.onnx as it is; compiling means proving that every linear runs in INT8.

The fast path is ``MatMulIntegerToFloat`` on uint8 activations. ONNX Runtime makes it itself from Q/DQ nodes
with one consumer per Q (ORT.md); a graph that is not fused is silently slower than FP32, so the optimized
graph is read and counted here.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.base import CompileOptions, version_of
from cushion_deploy.errors import CheckFailed
from cushion_deploy.store import require_space
from cushion_deploy.store.digests import digest_json

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
SESSION_CONFIG = {
    # Masked rows of Softmax produce subnormals, which cost up to 30 times a call.
    "session.set_denormal_as_zero": "1",
    # x86 without VNNI adds products of uint8 and int8 in saturating 16 bits. There, and only there, this turns
    # the int8 weights into uint8 with zero point 128: the same codes, and sums that are right.
    "session.x64quantprecision": "1",
}


@dataclass
class Coverage:
    """What the optimized graph runs in INT8.

    Attributes:
        int8: Sites whose MatMul is fused to the integer kernel on a uint8 activation.
        left: names of nodes that should have been fused and of Sites without a fused node, with the reason.
        kernels: operator types of the optimized graph, counted.
        rewritten: weights that were stored as uint8 with zero point 128.
        changed: Sites whose rewritten weight is not the same codes; must stay empty.
    """

    int8: set[Site] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    rewritten: int = 0
    changed: list[str] = field(default_factory=list)


class OnnxRuntimeCpu:
    """The embedded default engine."""

    name = "onnxruntime"
    dtypes: tuple[Dtype, ...] = ("float32",)
    in_place_cache = False

    def require(self) -> None:
        """Check that it can compile here; raises MissingDependency where ONNX Runtime is not installed."""
        self.version()

    def check(self, options: CompileOptions) -> None:
        """Targets and limits have no meaning for it."""

    def version(self) -> str:
        """Return the version of ONNX Runtime."""
        return version_of(DISTRIBUTIONS, self.name, "cpu")

    def gpus(self) -> None:
        """It runs on the CPU."""

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Optimize the graph as a session would, count what became INT8, and write ``engine.json``.

        Raises:
            MissingDependency: ONNX Runtime is not installed.
            CheckFailed: a linear would not run in the integer kernel, or a rewrite changed a code.
        """
        version = self.version()
        coverage = read_coverage(graph)
        found = sum(graph.sites[site] for site in coverage.int8)
        if coverage.changed:
            raise CheckFailed(
                f"ONNX Runtime {version} changed weight codes of {', '.join(coverage.changed[:3])}",
                hint="use the pinned version of onnxruntime, and report this",
            )
        if graph.quantized and graph.linears - found > options.allow_float_linears:
            raise CheckFailed(
                f"ONNX Runtime {version} runs {found} of {graph.linears} linears in INT8; "
                f"left: {'; '.join(coverage.left[:3])}",
                hint="use the pinned version of onnxruntime, or allow it with --allow-float-linears",
            )
        artifact = EngineArtifact(
            engine=self.name,
            targets=("cpu",),
            key=digest_json({"graph": graph.digest, "engine": self.name, "version": version, "config": SESSION_CONFIG}),
            files=("engine.json",),
            linears=graph.linears,
            int8_linears=found,
            fused_attention=sum(
                coverage.kernels[op] for op in ("MultiHeadAttention", "GroupQueryAttention", "Attention")
            ),
            ran=True,
            details={
                "session_config": SESSION_CONFIG,
                "integer_matmuls": coverage.kernels["MatMulIntegerToFloat"],
                "weights_stored_as_uint8": coverage.rewritten,
                "codes_changed": 0,
                "left_in_float": coverage.left,
                "kernels": dict(coverage.kernels.most_common()),
                "machine": platform.machine(),
            },
            lineage=Lineage(graph=graph.digest),
            versions={self.name: version},
        )
        (folder / "engine.json").write_text(json.dumps(artifact.to_json(), indent=1, sort_keys=True) + "\n")
        return artifact


def read_coverage(graph: ExportedGraph) -> Coverage:
    """Return what ONNX Runtime makes of a graph on this machine, read off its optimized form."""
    import onnx_ir as ir
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="cushion-ort-") as name:
        folder = Path(name)
        require_space(folder, 2 * graph.size)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        sites = set(graph.sites) if graph.quantized else set()
        return _count(ir.load(folder / "optimized.onnx"), ir.load(graph.path), sites)


def _count(optimized: Any, canonical: Any, sites: set[Site]) -> Coverage:
    coverage = Coverage()
    values, original = optimized.graph.initializers, canonical.graph.initializers
    for node in optimized.graph:
        coverage.kernels[node.op_type] += 1
        if node.op_type == "MatMulIntegerToFloat":
            weight, zero = node.inputs[1].name, node.inputs[4]
            site = Site(weight.split(".weight_codes")[0])
            if site not in sites:
                coverage.left.append(f"{node.name}: weight {weight} belongs to no Site")
            elif zero is None or zero.name not in values or values[zero.name].const_value.numpy().dtype != np.uint8:
                coverage.left.append(f"{node.name}: activation is not uint8")
            else:
                coverage.int8.add(site)
                if weight != f"{site}.weight_codes":
                    coverage.rewritten += 1
                    before = original[f"{site}.weight_codes"].const_value.numpy().astype(np.int16)
                    after = values[weight].const_value.numpy().astype(np.int16) - 128
                    if not np.array_equal(before, after):
                        coverage.changed.append(site)
        elif node.op_type == "MatMul" and any(_is_dequantized(value) for value in node.inputs):
            coverage.left.append(f"{node.name}: DequantizeLinear -> MatMul was not fused")
    coverage.left += [f"{site}: not in the integer kernel" for site in sorted(sites - coverage.int8)]
    return coverage


def _is_dequantized(value: Any) -> bool:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    # Attention reads an INT8 cache through one on purpose; what it dequantizes is a graph output, perhaps turned.
    codes = producer.inputs[0]
    if (turn := codes.producer()) is not None and turn.op_type == "Transpose":
        codes = turn.inputs[0]
    return not codes.is_graph_output()
