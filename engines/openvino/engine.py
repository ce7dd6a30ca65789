"""OpenVINO as an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.openvino.compile import compile_blob
from cushion_deploy.engines.openvino.kernels import require_exact, this_machine
from cushion_deploy.engines.openvino.library import NAME, installed_version
from cushion_deploy.engines.openvino.session import OpenVinoSession, open_session
from cushion_deploy.errors import CheckFailed


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO on the CPU (implements ``Engine``)."""

    @property
    def name(self) -> str:
        """Name on the command line, and of the engine's folder in a bundle."""
        return NAME

    @property
    def compiles_to(self) -> Product:
        """A blob."""
        return "blob"

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The type of ``model.onnx``."""
        return ("float32",)

    @property
    def gathers_codes(self) -> bool:
        """Whether the rows of an INT8 embedding are gathered as codes: it runs the graph of the bundle."""
        return True

    @property
    def in_place_cache(self) -> bool:
        """Its caches grow."""
        return False

    def version(self) -> str:
        """Return the version of OpenVINO; raises MissingDependency if it is not installed."""
        return installed_version()

    def gpus(self) -> None:
        """It runs on the CPU."""

    def require(self) -> None:
        """Check that OpenVINO is installed and exact on this processor; raises MissingDependency if it is not."""
        self.version()
        require_exact()

    def check(self, options: CompileOptions) -> None:
        """Accept any options: targets and limits do not apply to it."""

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Write the blob and ``engine.json``; see :func:`.compile.compile_blob`."""
        return compile_blob(graph, folder, options)

    def require_runnable(self, artifact: EngineArtifact, graph: ExportedGraph) -> None:
        """Check that the blob was compiled from this graph; raises CheckFailed if it was not."""
        if artifact.lineage.graph != graph.digest:
            raise CheckFailed(
                "the blob was compiled from another graph than the bundle's",
                hint="compile it again with `cushion-deploy engine BUNDLE --engine openvino -o BUNDLE`",
            )

    def reads(self, artifact: EngineArtifact) -> bool:
        """Return whether the blob was compiled by this version of OpenVINO for the instruction set of this machine."""
        self.version()
        return bool(artifact.details.get("requirements") == this_machine().requirements)

    def open(self, graph: ExportedGraph, plan: bytes = b"", *, threads: int | None = None) -> OpenVinoSession:
        """Open a session from the blob, or compile ``model.onnx`` if there is none; see :func:`.open_session`."""
        return open_session(graph, plan, threads=threads)
