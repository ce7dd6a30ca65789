"""What an engine must offer, and the options of a compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.session import DecoderSession

Product = Literal["plan", "graph", "blob", "report"]
"""What :meth:`Engine.compile` writes: a plan, which then runs instead of ``model.onnx``; a graph, which then runs
instead of ``model.onnx`` unless that suits the engine as it is; a blob, which spares compiling ``model.onnx`` again on
machines like this one; or a report on how ``model.onnx`` runs."""


@dataclass(frozen=True)
class CompileOptions:
    """Targets and limits of a compilation; an engine ignores those that do not apply to it.

    Attributes:
        targets: engine-specific names such as ``sm86``; empty for the engine's default.
        max_batch: largest batch of the optimization profiles.
        max_context: longest context in tokens (prompt and generated tokens, without the prefix).
        max_prefill: most prompt tokens in one call.
        allow_float_linears: linears that may stay in floating point before the compilation fails.
    """

    targets: Sequence[str] = ()
    max_batch: int = 1
    max_context: int = 2048
    max_prefill: int = 512
    allow_float_linears: int = 0

    def key(self) -> dict[str, object]:
        """Return the JSON value that enters the compatibility key."""
        return {**asdict(self), "targets": list(self.targets)}


class Engine(Protocol):
    """An inference engine: whether it is available, what it compiles, and how it runs a graph.

    Constructing one is free: libraries are imported by the methods that need them, drivers only in a subprocess.
    """

    @property
    def name(self) -> str:
        """Name on the command line, and of the engine's folder in a bundle."""
        ...

    @property
    def compiles_to(self) -> Product:
        """What :meth:`compile` writes, and so whether :meth:`open` runs a plan or ``model.onnx``."""
        ...

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """Floating-point types of the graphs that it compiles, its default first."""
        ...

    @property
    def in_place_cache(self) -> bool:
        """Whether it updates a static cache in place (KVCacheUpdate); a growing cache is copied at every step."""
        ...

    @property
    def gathers_codes(self) -> bool:
        """Whether it runs a graph with the codes of an INT8 embedding; if not, its graph has them dequantized."""
        ...

    def version(self) -> str:
        """Return the version of the library; raises MissingDependency if it is not installed."""
        ...

    def gpus(self) -> tuple[str, ...] | None:
        """Return the GPUs of this machine that it could run on, or None if it needs none."""
        ...

    def require(self) -> None:
        """Check that it can compile on this machine; raises MissingDependency, with what to do, if it cannot."""
        ...

    def check(self, options: CompileOptions) -> None:
        """Check the options before any work is done for them; raises UsageError if they cannot be met."""
        ...

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Compile ``graph`` into the empty ``folder``, count the linears in INT8, and write ``engine.json``.

        Nothing is executed: ``ran`` is False, and ``details["not_run"]`` says so. The stage that compiles runs it.

        Raises:
            MissingDependency: the library or the GPU that it needs is missing.
            UsageError: an unknown target, or a limit that cannot be met.
            CheckFailed: fewer linears run in INT8 than ``allow_float_linears`` permits.
        """
        ...

    def require_runnable(self, artifact: EngineArtifact, graph: ExportedGraph) -> None:
        """Check that a plan can run on this machine, before its bytes are read.

        Args:
            artifact: ``engine.json`` of the plan.
            graph: graph of the bundle that holds the plan.

        Raises:
            MissingDependency: the library or the GPU is missing.
            CheckFailed: the plan was compiled for another library version, GPU or graph.
        """
        ...

    def reads(self, artifact: EngineArtifact) -> bool:
        """Return whether :meth:`open` should get the bytes of what was compiled.

        False for an engine that runs ``model.onnx``, and for a blob of another machine or version; True for any plan,
        which has passed :meth:`require_runnable`. Raises MissingDependency if the library is missing.
        """
        ...

    def open(self, graph: ExportedGraph, plan: bytes = b"", *, threads: int | None = None) -> DecoderSession:
        """Open a session.

        Args:
            graph: graph of a verified bundle, or one just written; the prefix and scales of its cache lie beside it.
                For an engine that compiled a graph of its own, that graph.
            plan: the compiled plan or blob, if the engine has one. Deserializing a plan runs machine code from it: pass
                only bytes whose digest is in a verified manifest, or that were compiled just now.
            threads: threads of an engine on the CPU; None for one per physical core.

        Raises:
            MissingDependency: the library or the GPU is missing.
            CheckFailed: the library refuses the plan, or the GPU has too little memory.
            UntrustedArtifact: the graph or the plan does not match the contract of ``graph``.
        """
        ...
