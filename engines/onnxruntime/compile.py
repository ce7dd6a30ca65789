"""Compile for ONNX Runtime on the CPU: it runs model.onnx as it is, so compiling checks that every linear is INT8."""

from __future__ import annotations

import platform
from pathlib import Path

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, write_artifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.coverage import Coverage, read_coverage
from cushion_deploy.engines.onnxruntime.kernels import kernels_in_words
from cushion_deploy.engines.onnxruntime.settings import CPU, installed_version, session_config
from cushion_deploy.errors import CheckFailed
from cushion_deploy.store.digests import digest_json


def compile_report(graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
    """Count what ONNX Runtime runs in INT8 on this machine, and write ``engine.json`` into ``folder``.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        CheckFailed: too many linears do not run in the integer kernel, or a rewrite changed a weight code.
    """
    version, config = installed_version(CPU), session_config()
    coverage = read_coverage(graph)
    found = _check_coverage(graph, coverage, version, options.allow_float_linears)
    artifact = EngineArtifact(
        engine=CPU.engine,
        targets=("cpu",),
        key=digest_json({"graph": graph.digest, "engine": CPU.engine, "version": version, "config": config}),
        files=(ENGINE_FILE,),
        linears=graph.linears,
        int8_linears=found,
        fused_attention=coverage.fused_attention,
        ran=False,
        details={
            "session_config": config,
            "multiplies": kernels_in_words(),
            "integer_matmuls": coverage.integer_matmuls,
            "weights_stored_as_uint8": coverage.rewritten,
            "codes_changed": 0,
            "left_in_float": coverage.left,
            "kernels": dict(coverage.kernels.most_common()),
            "machine": platform.machine(),
            "not_run": "not run: compilation executes nothing",
        },
        lineage=Lineage(graph=graph.digest),
        versions={CPU.engine: version},
    )
    write_artifact(artifact, folder)
    return artifact


def _check_coverage(graph: ExportedGraph, coverage: Coverage, version: str, allowed: int) -> int:
    """Return how many linears run in INT8, counted before packing; raises CheckFailed if too few do."""
    found = sum(graph.sites[site] for site in coverage.int8)
    if coverage.changed:
        raise CheckFailed(
            f"ONNX Runtime {version} changed weight codes of {', '.join(coverage.changed[:3])}",
            hint="use the pinned version of onnxruntime, and report this",
        )
    if graph.quantized and graph.linears - found > allowed:
        raise CheckFailed(
            f"ONNX Runtime {version} runs {found} of {graph.linears} linears in INT8; "
            f"left: {'; '.join(coverage.left[:3])}",
            hint="use the pinned version of onnxruntime, or allow it with --allow-float-linears",
        )
    return found
