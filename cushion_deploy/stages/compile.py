"""Compile: build an engine from a graph, and count the linears that run in INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cushion_deploy.core.engine_artifact import EngineArtifact, read_artifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store import place

LINKED_BYTES = 64 << 20
"""Engine files of at least this size are hard-linked from the work folder; smaller ones may be edited, so copied."""
COMPILE_SECONDS: Mapping[Product, float] = {"report": 2e-8, "blob": 4e-8, "plan": 8e-8, "nothing": 0.0}
"""Seconds per parameter, by what the engine compiles."""
GRAPH_BYTES: Mapping[Product, int] = {"report": 0, "blob": 2, "plan": 4, "nothing": 0}
"""Bytes per parameter that stay on disk, by what the engine compiles."""


@dataclass(frozen=True)
class CompiledEngine:
    """A compiled engine, and the folder that holds its files."""

    artifact: EngineArtifact
    folder: Path

    def place(self, bundle: Path) -> None:
        """Place the engine's files in a bundle that is being written."""
        target = bundle / "engines" / self.artifact.engine
        target.mkdir(parents=True)
        for name in self.artifact.files:
            file = self.folder / name
            place(file, target / name, link=file.stat().st_size >= LINKED_BYTES)


@dataclass(frozen=True)
class Compile(Stage[CompiledEngine]):
    """Compile a graph for one engine.

    Attributes:
        graph: the graph to compile.
        engine: name of the engine, a key of ``ENGINES``.
        engine_version: version of the library that compiles.
        options: targets, limits of the optimization profiles, linears that may stay in floating point.
    """

    name: ClassVar[str] = "engine"
    version: ClassVar[int] = 1
    graph: Node[ExportedGraph]
    engine: str
    engine_version: str
    options: CompileOptions

    @classmethod
    def of(cls, graph: Node[ExportedGraph], engine: str, options: CompileOptions) -> Compile:
        """Return the stage for the installed version of the engine's library."""
        return cls(graph, engine, ENGINES[engine].version(), options)

    @property
    def label(self) -> str:
        """The name of the stage and of the engine."""
        return f"{self.name}-{self.engine}"

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the engine's files; raises CheckFailed if too few linears run in INT8."""
        with elapsed(inputs.progress, f"compiling for {self.engine}"):
            ENGINES[self.engine].compile(inputs.get(self.graph), out, self.options)

    def read(self, folder: Path) -> CompiledEngine:
        """Return the engine."""
        return CompiledEngine(read_artifact(folder), folder)

    def room(self, inputs: Inputs) -> int:
        """A plan may hold every weight twice."""
        return 2 * inputs.get(self.graph).size

    def disk(self, spec: ModelSpec) -> int:
        """Return the size of two graphs for a plan and of one for a blob; a report is only a description."""
        return GRAPH_BYTES[ENGINES[self.engine].compiles_to] * spec.parameters

    def seconds(self, speed: Speed) -> float:
        """Count every parameter: a plan is built, a graph only opened."""
        return COMPILE_SECONDS[ENGINES[self.engine].compiles_to] * speed.spec.parameters


def compile_options(recipe: Recipe, targets: tuple[str, ...], allow_float_linears: int = 0) -> CompileOptions:
    """Return the options of a compilation; the limits come from the recipe."""
    plans = recipe.tensorrt
    limits = plans.max_batch, plans.max_context, plans.max_prefill
    return CompileOptions(targets, *limits, allow_float_linears=allow_float_linears)
