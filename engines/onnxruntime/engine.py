"""ONNX Runtime as an engine, one for each execution provider."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.onnxruntime.compile import compile_report
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, Provider, installed_version
from cushion_deploy.errors import UsageError


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on one execution provider (implements ``Engine``); all of them run ``model.onnx`` as it is.

    INT8 coverage is counted for the CPU provider only: no INT8 claim is made for the others.
    """

    provider: Provider = CPU

    @property
    def name(self) -> str:
        """Name on the command line, and of the engine's folder in a bundle."""
        return self.provider.engine

    @property
    def compiles_to(self) -> Product:
        """A report on the CPU, nothing elsewhere."""
        return "report" if self.provider == CPU else "nothing"

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The type of ``model.onnx``."""
        return ("float32",)

    @property
    def in_place_cache(self) -> bool:
        """Its caches grow."""
        return False

    @property
    def gathers_codes(self) -> bool:
        """Gather reads any type."""
        return True

    def version(self) -> str:
        """Return the version of ONNX Runtime; raises MissingDependency if it is not installed."""
        return installed_version(self.provider)

    def gpus(self) -> None:
        """It compiles on the CPU."""

    def require(self) -> None:
        """Check that ONNX Runtime is installed; raises MissingDependency if it is not."""
        self.version()

    def check(self, options: CompileOptions) -> None:
        """Accept any options: targets and limits do not apply to it."""

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Count the linears in INT8 and write ``engine.json``; see :func:`.compile.compile_report`."""
        if self.compiles_to == "nothing":
            raise UsageError(
                f"engine '{self.name}' runs model.onnx as it is: there is nothing to compile",
                hint=f"run the bundle with --engine {self.name}",
            )
        return compile_report(graph, folder, options)

    def require_runnable(self, artifact: EngineArtifact, graph: ExportedGraph) -> None:
        """Accept any artifact: there is no plan, and opening a session checks the provider."""

    def reads(self, artifact: EngineArtifact) -> bool:
        """Return False: it runs ``model.onnx``."""
        return False

    def open(self, graph: ExportedGraph, plan: bytes = b"", *, threads: int | None = None) -> OnnxRuntimeSession:
        """Open a session of ``model.onnx`` on the provider."""
        return open_session(graph, threads=threads, provider=self.provider)
