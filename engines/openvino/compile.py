"""Compile for OpenVINO: check that every linear is INT8, and export the compiled model as a blob."""

from __future__ import annotations

from pathlib import Path

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, write_artifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.openvino.coverage import Coverage, read_coverage
from cushion_deploy.engines.openvino.kernels import REQUIREMENTS, require_exact
from cushion_deploy.engines.openvino.library import NAME, installed_version, settings
from cushion_deploy.engines.openvino.model import compile_graph
from cushion_deploy.errors import CheckFailed
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import disk_errors, require_space

BLOB = "cpu.blob"


def compile_blob(graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
    """Compile a graph, count what runs in INT8, and write the blob and ``engine.json`` into ``folder``.

    Raises:
        MissingDependency: OpenVINO is not installed, or the processor adds products of INT8 codes with saturation.
        UsageError: too little disk space.
        CheckFailed: too many linears do not run in INT8.
    """
    if graph.quantized:
        require_exact()
    version = installed_version()
    compiled = compile_graph(graph)
    coverage = read_coverage(compiled, graph.sites if graph.quantized else ())
    found = _check_coverage(graph, coverage, version, options.allow_float_linears)
    requirements = str(compiled.get_property(REQUIREMENTS))
    with disk_errors(folder):
        require_space(folder, 2 * graph.size)
        blob = compiled.export_model().getbuffer()
        (folder / BLOB).write_bytes(blob)
    of_all = {"graph": graph.digest, "engine": NAME, "requirements": requirements, "settings": settings()}
    artifact = EngineArtifact(
        engine=NAME,
        targets=("cpu",),
        key=digest_json(of_all),
        files=(BLOB, ENGINE_FILE),
        linears=graph.linears,
        int8_linears=found,
        fused_attention=coverage.fused_attention,
        ran=False,
        details={
            "requirements": requirements,
            "settings": settings(),
            "left_in_float": coverage.left,
            "layers": dict(coverage.layers.most_common()),
            "blob_bytes": len(blob),
            "not_run": "not run: compilation executes nothing",
        },
        lineage=Lineage(graph=graph.digest),
        versions={NAME: version},
    )
    write_artifact(artifact, folder)
    return artifact


def _check_coverage(graph: ExportedGraph, coverage: Coverage, version: str, allowed: int) -> int:
    """Return how many linears run in INT8, counted before packing; raises CheckFailed if too few do."""
    found = sum(graph.sites[site] for site in coverage.int8)
    if graph.quantized and graph.linears - found > allowed:
        raise CheckFailed(
            f"OpenVINO {version} runs {found} of {graph.linears} linears in INT8; left: {'; '.join(coverage.left[:3])}",
            hint="use the pinned version of openvino, or allow it with --allow-float-linears",
        )
    return found
