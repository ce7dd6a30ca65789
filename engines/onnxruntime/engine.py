"""ONNX Runtime as an engine, one for each execution provider."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.onnxruntime.compile import compile_report
from cushion_deploy.engines.onnxruntime.compile_graph import compile_graph, require_same_bundle
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, GPU_DISTRIBUTION, Provider, installed_version, is_installed
from cushion_deploy.engines.probe import probe
from cushion_deploy.errors import UsageError


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on one execution provider (implements ``Engine``).

    They run ``model.onnx`` as it is, but a provider that multiplies floats runs a float16 graph compiled from it, and
    one that reads no codes of an INT8 embedding runs a graph without them. INT8 coverage is counted for the CPU
    provider only: no INT8 claim is made for the others.
    """

    provider: Provider = CPU

    @property
    def name(self) -> str:
        """Name on the command line, and of the engine's folder in a bundle."""
        return self.provider.engine

    @property
    def compiles_to(self) -> Product:
        """A report on the CPU, a graph elsewhere."""
        return "report" if self.provider == CPU else "graph"

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The type of ``model.onnx``; float16 first for a provider that multiplies floats.

        Not bfloat16, which numpy does not have: the host could not write the first keys and values of a cache.
        """
        return ("float16", "float32") if self.provider.multiplies_floats else ("float32",)

    @property
    def in_place_cache(self) -> bool:
        """Its caches grow."""
        return False

    @property
    def gathers_codes(self) -> bool:
        """Gather reads any type, but TensorRT accepts an INT8 constant in front of a DQ only."""
        return self.provider.gathers_codes

    def version(self) -> str:
        """Return the version of ONNX Runtime; raises MissingDependency if it is not installed."""
        return installed_version(self.provider)

    def gpus(self) -> tuple[str, ...] | None:
        """Return the GPUs that the installed build could run on; None for the CPU provider."""
        if not self.provider.device:
            return None
        return probe("onnxruntime").gpus if is_installed(GPU_DISTRIBUTION) else ()

    def require(self) -> None:
        """Check that ONNX Runtime is installed; raises MissingDependency if it is not."""
        self.version()

    def check(self, options: CompileOptions) -> None:
        """Accept any options: targets and limits do not apply to it."""

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Write a report or a graph; see :func:`.compile_report` and :func:`.compile_graph`."""
        if self.compiles_to == "graph":
            return compile_graph(graph, folder, self.provider)
        return compile_report(graph, folder, options)

    def require_runnable(self, artifact: EngineArtifact, graph: ExportedGraph) -> None:
        """Check that a graph was compiled from this bundle's parts; opening a session checks the provider."""
        if self.compiles_to == "graph":
            require_same_bundle(artifact, graph)

    def reads(self, artifact: EngineArtifact) -> bool:
        """Return False: it runs a graph, which is read from its path."""
        return False

    def open(self, graph: ExportedGraph, plan: bytes = b"", *, threads: int | None = None) -> OnnxRuntimeSession:
        """Open a session of a graph on the provider; raises UsageError for an embedding that it cannot read."""
        if graph.int8_embedding and not self.gathers_codes:
            raise UsageError(
                f"model.onnx stores the embedding as INT8 codes, which {self.provider.name} cannot read",
                hint=f"add a graph without them: `cushion-deploy engine BUNDLE --engine {self.name} --output NEW`",
            )
        return open_session(graph, threads=threads, provider=self.provider)
