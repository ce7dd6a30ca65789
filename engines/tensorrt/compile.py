"""Compile a graph to one TensorRT plan with a prefill and a decode profile, and count its linears in INT8."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, write_artifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.external_data import require_data_beside
from cushion_deploy.engines.probe import Probe
from cushion_deploy.engines.tensorrt.coverage.check import check_coverage, coverage_details, graph_linears
from cushion_deploy.engines.tensorrt.coverage.inspector import read_inspection
from cushion_deploy.engines.tensorrt.coverage.layer_log import read_plan
from cushion_deploy.engines.tensorrt.coverage.plan_report import PlanReport
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.profiles import Limits, Shapes, abridged, profile_shapes
from cushion_deploy.engines.tensorrt.vendor_command import vendor_command
from cushion_deploy.engines.tensorrt.worker import PLAN, read_inspection_file, read_listing, run_worker
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import disk_errors, require_space


@dataclass(frozen=True)
class PlanRequest:
    """A plan to compile: from which graph, by which library, for which targets and shapes.

    Attributes:
        flavour: TensorRT-RTX or standard TensorRT.
        graph: graph to compile.
        version: version of the library.
        targets: compute capabilities such as ``sm86``.
        options: options of the compilation.
    """

    flavour: Flavour
    graph: ExportedGraph
    version: str
    targets: tuple[str, ...]
    options: CompileOptions

    @cached_property
    def limits(self) -> Limits:
        """Limits of the optimization profiles; raises UsageError for a limit below 1."""
        return Limits.of(self.options, self.graph.contract)

    @cached_property
    def shapes(self) -> dict[str, Shapes]:
        """Shapes of the optimization profiles by name."""
        return profile_shapes(self.graph.contract, self.limits)

    @property
    def file(self) -> str:
        """File name of the plan."""
        return f"{'+'.join(self.targets)}.engine"

    @property
    def key(self) -> str:
        """Digest of everything that the plan depends on; the bytes of two plans of one request differ."""
        return digest_json(
            {
                "graph": self.graph.digest,
                "engine": self.flavour.name,
                "version": self.version,
                "targets": list(self.targets),
                "profiles": self.shapes,
                "options": self.options.key(),
            }
        )

    def to_worker(self) -> dict[str, Any]:
        """Return the JSON request of :func:`~cushion_deploy.engines.tensorrt.worker.build`."""
        return {
            "onnx": str(self.graph.path.resolve()),
            "targets": self.targets if self.flavour.ahead_of_time else (),
            "profiles": list(self.shapes.values()),
            # A static cache is decoded as a CUDA graph, and no memory may be allocated during a capture.
            "user_allocation": self.graph.contract.cache_capacity > 0,
        }

    def details(self, gpus: Sequence[str]) -> dict[str, Any]:
        """Return the details of ``engine.json`` that follow from the request, JSON-ready."""
        contract = self.graph.contract
        return {
            "dtype": contract.dtype,
            # A plan built on a device is tuned for that GPU model.
            "device": "" if self.flavour.ahead_of_time else gpus[0],
            "cache_capacity": contract.cache_capacity,
            "cache_dtype": contract.cache_dtype,
            "prefix_mode": contract.prefix_mode,
            "limits": asdict(self.limits),
            "profiles": {name: abridged(shapes) for name, shapes in self.shapes.items()},
            "command": vendor_command(self.flavour, self.graph, self.file, self.targets, self.shapes),
            "not_run": why_not_run(gpus, self.targets),
        }


def compile_plan(
    flavour: Flavour, library: Probe, graph: ExportedGraph, folder: Path, options: CompileOptions
) -> EngineArtifact:
    """Build one plan for every target into ``folder``, with ``engine.json`` beside it.

    Args:
        flavour: TensorRT-RTX or standard TensorRT.
        library: the importable library, and the GPUs of this machine.
        graph: graph to compile.
        folder: empty folder.
        options: targets and limits.

    Raises:
        UsageError: an unknown target, a limit below 1, or a full disk.
        CheckFailed: the parser rejects the graph, the builder fails or crashes, or fewer linears run in INT8 than
            ``allow_float_linears`` permits.
        UntrustedArtifact: the graph reads tensors from elsewhere than beside it.
    """
    targets = flavour.choose_targets(options.targets, library.gpus)
    request = PlanRequest(flavour, graph, library.version, targets, options)
    require_data_beside(graph.path)
    worker_request = request.to_worker()
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        require_space(folder, 2 * graph.size)
        outcome = run_worker(flavour, worker_request, scratch)
        plan = _read_kernels(request, scratch)
        artifact = _describe(request, plan, outcome, library.gpus)
        os.replace(scratch / PLAN, folder / request.file)
        write_artifact(artifact, folder)
    return artifact


def _read_kernels(request: PlanRequest, scratch: Path) -> PlanReport:
    """Return the kernels of the plan: from the build log if no device is needed, else from the engine inspector."""
    if request.flavour.ahead_of_time:
        return read_plan(read_listing(scratch), request.version)
    return read_inspection(read_inspection_file(scratch), len(request.shapes), request.version)


def _describe(
    request: PlanRequest, plan: PlanReport, outcome: Mapping[str, Any], gpus: Sequence[str]
) -> EngineArtifact:
    """Return ``engine.json`` of a plan that was built; raises CheckFailed if too few linears run in INT8."""
    graph = request.graph
    linears = graph_linears(outcome["linears"], graph.sites)
    allowed = request.options.allow_float_linears if graph.quantized else graph.linears
    return EngineArtifact(
        engine=request.flavour.name,
        targets=request.targets,
        key=request.key,
        files=(request.file, ENGINE_FILE),
        linears=graph.linears,
        int8_linears=check_coverage(plan, linears, allowed, len(request.shapes)),
        fused_attention=plan.fused_attention,
        ran=False,
        details={
            **coverage_details(plan, linears if graph.quantized else (), outcome),
            **request.details(gpus),
            "plan_bytes": outcome["plan_bytes"],
            "build_seconds": outcome["parse_seconds"] + outcome["build_seconds"],
            "peak_rss_bytes": outcome["peak_rss_bytes"],
        },
        lineage=replace(graph.lineage, graph=graph.digest),
        versions={request.flavour.name: request.version},
    )


def why_not_run(gpus: Sequence[str], targets: Sequence[str]) -> str:
    """Return why a plan that was just built has not been executed."""
    if not gpus:
        return "not run: no NVIDIA GPU on this machine"
    if not any(gpu.split(" ", 1)[0] in targets for gpu in gpus):
        return f"not run: {', '.join(gpus)} is none of the targets {', '.join(targets)}"
    return "not run: compilation builds and executes nothing"
