"""The one protocol of all engines, and what a compilation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.errors import MissingDependency


@dataclass(frozen=True)
class CompileOptions:
    """Limits and targets of a compilation; an engine ignores what has no meaning for it.

    Attributes:
        targets: engine-specific names such as ``sm86``; empty for the engine's default.
        max_batch: largest batch of the optimization profiles.
        max_context: longest context (prompt and generated tokens, without the prefix).
        max_prefill: longest piece of prompt in one call.
        allow_float_linears: linears that may stay in floating point before the build counts as failed.
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
    """One engine: probe it, compile a graph for it, report what it made of the graph."""

    @property
    def name(self) -> str:
        """Name on the command line and of the folder in the bundle."""
        ...

    @property
    def in_place_cache(self) -> bool:
        """Whether it updates a static cache in place (KVCacheUpdate); one that grows is copied at every step."""
        ...

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """Floating-point types of the graphs that it compiles, its default first."""
        ...

    def require(self) -> None:
        """Check that it can compile here; raises MissingDependency, with what to do, where it cannot."""
        ...

    def check(self, options: CompileOptions) -> None:
        """Check what is asked for before anything is made for it; raises UsageError where it cannot be compiled."""
        ...

    def version(self) -> str:
        """Return the version of the library; raises MissingDependency when it is not there."""
        ...

    def gpus(self) -> tuple[str, ...] | None:
        """Return the devices here that it could run on; None for an engine that needs none."""
        ...

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Compile ``graph`` into the empty ``folder``, read the INT8 coverage off the result, write ``engine.json``.

        Raises:
            MissingDependency: the library is not there.
            UsageError: an unknown target or a limit that the engine cannot meet.
            CheckFailed: fewer linears in INT8 than ``allow_float_linears`` permits.
        """
        ...


def version_of(distributions: Sequence[str], engine: str, extra: str) -> str:
    """Return the version of the first of several distributions that is installed.

    Raises:
        MissingDependency: none is; the hint carries the install line.
    """
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise MissingDependency(
        f"engine '{engine}' needs {distributions[0]}, which is not installed",
        hint=f"pip install 'cushion-deploy[{extra}]'",
    )
