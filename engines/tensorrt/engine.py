"""TensorRT as an engine, in both flavours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.session import cached_prefix, cached_scales
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.probe import Probe, probe
from cushion_deploy.engines.tensorrt.compatibility import require_runnable
from cushion_deploy.engines.tensorrt.compile import compile_plan
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.errors import MissingDependency


@dataclass(frozen=True)
class TensorRt:
    """TensorRT-RTX, which builds without a GPU, or standard TensorRT, which needs the GPU (implements ``Engine``)."""

    flavour: Flavour

    @property
    def name(self) -> str:
        """Name on the command line, and of the engine's folder in a bundle."""
        return self.flavour.name

    @property
    def compiles_to(self) -> Product:
        """A plan."""
        return "plan"

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """Floating-point types of the graphs that it compiles, its default first."""
        return ("float16", "bfloat16", "float32")

    @property
    def in_place_cache(self) -> bool:
        """Whether the installed library updates a static cache in place."""
        found = probe(self.flavour.module)
        return found.importable and self.flavour.has_cache_update(found.version)

    @property
    def gathers_codes(self) -> bool:
        """TensorRT accepts an INT8 constant in front of a DQ only."""
        return False

    def version(self) -> str:
        """Return the version of the library; raises MissingDependency if it is missing or too old."""
        return self._library().version

    def gpus(self) -> tuple[str, ...]:
        """Return the NVIDIA GPUs of this machine."""
        return probe(self.flavour.module).gpus

    def require(self) -> None:
        """Check that plans can be built here; raises MissingDependency if the library or the GPU is missing."""
        if not (self._library().gpus or self.flavour.ahead_of_time):
            raise MissingDependency(
                f"{self.flavour.product} builds on the GPU that a plan is for, and there is none here",
                hint="build on the device itself, or ahead of time with --engine tensorrt-rtx",
            )

    def check(self, options: CompileOptions) -> None:
        """Check the targets; raises UsageError for one that cannot be built for."""
        self.flavour.choose_targets(options.targets, self.gpus())

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Build the plan and ``engine.json`` into ``folder``; see :func:`.compile.compile_plan`."""
        self.require()
        return compile_plan(self.flavour, self._library(), graph, folder, options)

    def require_runnable(self, artifact: EngineArtifact, graph: ExportedGraph) -> None:
        """Check that a plan can run on this machine; see :func:`.compatibility.require_runnable`."""
        install = f"pip install 'cushion-deploy[{self.flavour.extra},cuda]'"
        require_runnable(artifact, graph, probe(self.flavour.module), install)

    def reads(self, artifact: EngineArtifact) -> bool:
        """Return True: it runs the plan."""
        return True

    def open(self, graph: ExportedGraph, plan: bytes = b"", *, threads: int | None = None) -> TensorRtSession:
        """Deserialize a plan and open a session on the first GPU; ``threads`` does not apply to it."""
        prefix, kv = cached_prefix(graph), cached_scales(graph)
        return TensorRtSession(plan, graph.contract, self.flavour.module, prefix, kv)

    def _library(self) -> Probe:
        found = probe(self.flavour.module)
        if not found.importable:
            raise MissingDependency(
                f"{self.flavour.product} cannot be used: {found.problem}", hint=self.flavour.install
            )
        self.flavour.require_version(found.version)
        return found
