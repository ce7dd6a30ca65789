"""TensorRT as an engine, in both flavours: one plan with two optimization profiles, its INT8 coverage counted."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.probe import Probe, probe
from cushion_deploy.engines.tensorrt.command_line import vendor_command
from cushion_deploy.engines.tensorrt.coverage import check_coverage, coverage_details, graph_linears
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.inspector import read_inspection
from cushion_deploy.engines.tensorrt.layer_log import read_plan
from cushion_deploy.engines.tensorrt.plan_report import PlanReport
from cushion_deploy.engines.tensorrt.profiles import Limits, Shapes, brief, profiles
from cushion_deploy.engines.tensorrt.worker import PLAN, read_inspection_file, read_listing, run_worker
from cushion_deploy.errors import MissingDependency
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import disk_errors, replace_file, require_space

REPORT = "engine.json"


@dataclass(frozen=True)
class TensorRt:
    """TensorRT-RTX, which builds for any of its targets without a GPU, or standard TensorRT, which needs the GPU.

    The plan is machine code. Only a plan whose digest stands in a trusted manifest may be loaded.
    """

    flavour: Flavour
    dtypes: tuple[Dtype, ...] = ("float16", "bfloat16", "float32")

    @property
    def name(self) -> str:
        """Name on the command line and of the folder in the bundle."""
        return self.flavour.name

    @property
    def in_place_cache(self) -> bool:
        """Whether the library here updates a static cache in place."""
        found = probe(self.flavour.module)
        return found.importable and self.flavour.has_cache_update(found.version)

    def require(self) -> None:
        """Check that plans can be built here; raises MissingDependency where the library or its device is not there."""
        if not (self._importable().gpus or self.flavour.ahead_of_time):
            raise MissingDependency(
                f"{self.flavour.product} builds on the GPU that a plan is for, and there is none here",
                hint="build on the device itself, or ahead of time with --engine tensorrt-rtx",
            )

    def check(self, options: CompileOptions) -> None:
        """Check the targets; raises UsageError for one that cannot be built for."""
        self.flavour.choose_targets(options.targets, self.gpus())

    def version(self) -> str:
        """Return the version of the library; raises MissingDependency when it is not there or too old."""
        return self._importable().version

    def gpus(self) -> tuple[str, ...]:
        """Return the NVIDIA devices here."""
        return probe(self.flavour.module).gpus

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Build the plan for every target into ``folder``, with ``engine.json`` beside it.

        Raises:
            MissingDependency: the library, or the device that it needs, is not there.
            UsageError: an unknown target, a limit below 1, a full disk.
            CheckFailed: the parser refuses the graph, the builder fails or crashes, or fewer linears run in INT8
                than ``allow_float_linears`` permits.
        """
        self.require()
        flavour, found = self.flavour, self._importable()
        targets = flavour.choose_targets(options.targets, found.gpus)
        limits = Limits.of(options, graph.contract)
        shapes = profiles(graph.contract, limits)
        name = f"{'+'.join(targets)}.engine"
        with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as scratch_name:
            scratch = Path(scratch_name)
            require_space(folder, 2 * graph.size)
            request = {
                "onnx": str(graph.path.resolve()),
                "targets": targets if flavour.ahead_of_time else (),
                "profiles": list(shapes.values()),
                # A captured step must not allocate.
                "user_allocation": graph.contract.cache_capacity > 0,
            }
            outcome = run_worker(flavour, request, scratch)
            plan = self._read_kernels(scratch, len(shapes), found.version)
            linears = graph_linears(outcome["linears"], graph.sites)
            allowed = options.allow_float_linears if graph.quantized else graph.linears
            coverage = check_coverage(plan, linears, allowed, len(shapes))
            artifact = EngineArtifact(
                engine=self.name,
                targets=targets,
                key=compatibility_key(flavour, graph, found.version, targets, shapes, options),
                files=(name, REPORT),
                linears=graph.linears,
                int8_linears=coverage,
                fused_attention=plan.fused_attention,
                ran=False,
                details={
                    **coverage_details(plan, linears if graph.quantized else (), outcome),
                    "dtype": graph.contract.dtype,
                    # A plan that was tuned on a device belongs to that model of it.
                    "device": "" if flavour.ahead_of_time else found.gpus[0],
                    "cache_capacity": graph.contract.cache_capacity,
                    "cache_dtype": graph.contract.cache_dtype,
                    "prefix_mode": graph.contract.prefix_mode,
                    "limits": asdict(limits),
                    "profiles": {name: brief(shape) for name, shape in shapes.items()},
                    "command": vendor_command(flavour, graph, name, targets, shapes),
                    "not_run": why_not_run(found.gpus, targets),
                    "plan_bytes": outcome["plan_bytes"],
                    "build_seconds": outcome["parse_seconds"] + outcome["build_seconds"],
                    "peak_rss_bytes": outcome["peak_rss_bytes"],
                },
                lineage=replace(graph.lineage, graph=graph.digest),
                versions={self.name: found.version},
            )
            os.replace(scratch / PLAN, folder / name)
            replace_file(folder / REPORT, (json.dumps(artifact.to_json(), indent=1, sort_keys=True) + "\n").encode())
        return artifact

    def _read_kernels(self, scratch: Path, num_profiles: int, version: str) -> PlanReport:
        """Return the kernels of the plan: from the log where no device is needed, from the inspector elsewhere."""
        if self.flavour.ahead_of_time:
            return read_plan(read_listing(scratch), version)
        return read_inspection(read_inspection_file(scratch), num_profiles, version)

    def _importable(self) -> Probe:
        found = probe(self.flavour.module)
        if not found.importable:
            raise MissingDependency(
                f"{self.flavour.product} cannot be used: {found.problem}", hint=self.flavour.install
            )
        self.flavour.require_version(found.version)
        return found


def compatibility_key(
    flavour: Flavour,
    graph: ExportedGraph,
    version: str,
    targets: Sequence[str],
    shapes: Mapping[str, Shapes],
    options: CompileOptions,
) -> str:
    """Return the digest of everything that a plan depends on: plans of equal inputs differ by some bytes."""
    return digest_json(
        {
            "graph": graph.digest,
            "engine": flavour.name,
            "version": version,
            "targets": list(targets),
            "profiles": shapes,
            "options": options.key(),
        }
    )


def why_not_run(gpus: Sequence[str], targets: Sequence[str]) -> str:
    """Return why a plan that was just built has not been executed."""
    if not gpus:
        return "not run: no NVIDIA GPU on this machine"
    if not any(gpu.split(" ", 1)[0] in targets for gpu in gpus):
        return f"not run: {', '.join(gpus)} is none of the targets {', '.join(targets)}"
    return "not run: compilation builds and executes nothing"
