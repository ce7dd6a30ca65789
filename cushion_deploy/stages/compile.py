"""Compile: build an engine from a graph, and count the linears that run in INT8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, read_artifact, write_artifact
from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.core.session import DecoderSession, remarks
from cushion_deploy.engines.base import CompileOptions, Product
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import CushionError, MissingDependency
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import read_graph
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store import place

LINKED_BYTES = 64 << 20
"""Engine files of at least this size are hard-linked from the work folder; smaller ones may be edited, so copied."""
COMPILE_SECONDS: Mapping[Product, float] = {"report": 2e-8, "graph": 2e-8, "blob": 4e-8, "plan": 8e-8}
"""Seconds per parameter, by what the engine compiles."""
GRAPH_BYTES: Mapping[Product, int] = {"report": 0, "graph": 2, "blob": 2, "plan": 4}
"""Bytes per parameter that stay on disk, by what the engine compiles."""


@dataclass(frozen=True)
class CompiledEngine:
    """A compiled engine, and the folder that holds its files."""

    artifact: EngineArtifact
    folder: Path

    def open(self, graph: ExportedGraph) -> DecoderSession:
        """Open a session of what was compiled from ``graph``; see :meth:`Engine.open` for the errors."""
        engine = ENGINES[self.artifact.engine]
        engine.require_runnable(self.artifact, graph)
        if GRAPH_FILE in self.artifact.files:
            return engine.open(read_graph(self.folder))
        plans = [name for name in self.artifact.files if name != ENGINE_FILE]
        plan = (self.folder / plans[0]).read_bytes() if engine.reads(self.artifact) else b""
        return engine.open(graph, plan)

    def tried(self, graph: ExportedGraph) -> EngineArtifact:
        """Run a prompt of two tokens and one step, and return and write the description that says what happened.

        An engine whose device is missing, or that fails, was not run: the description has the reason. Nothing is raised
        for it, because a plan for another device is a valid result.
        """
        artifact = self.artifact
        details = {name: value for name, value in artifact.details.items() if name != "not_run"}
        try:
            with closing(self.open(graph)) as session:
                session.run(np.zeros((1, 2), dtype=np.int64), need_logits="none")
                session.run(np.zeros((1, 1), dtype=np.int64))
                said = remarks(session)
        except CushionError as e:
            known = artifact.details.get("not_run") if isinstance(e, MissingDependency) else None
            found = replace(artifact, ran=False, details={**details, "not_run": known or f"not run: {e.message}"})
        else:
            found = replace(artifact, ran=True, details={**details, **({"remarks": list(said)} if said else {})})
        write_artifact(found, self.folder)
        return found

    def place(self, bundle: Path) -> None:
        """Place the engine's files in a bundle that is being written; a graph that is the bundle's own stays out."""
        target, names = bundle / "engines" / self.artifact.engine, self.artifact.files
        target.mkdir(parents=True)
        if GRAPH_FILE in names and self.artifact.lineage.graph == read_graph(bundle).digest:
            write_artifact(replace(self.artifact, files=(ENGINE_FILE,)), target)
            return
        for name in names:
            file = self.folder / name
            # External data of a graph with a second hard link is rejected by onnx as a possible attack.
            linked = file.stat().st_size >= LINKED_BYTES and GRAPH_FILE not in self.artifact.files
            place(file, target / name, link=linked)


@dataclass(frozen=True)
class EngineToRun:
    """An engine that the parity ladder opens, besides ONNX Runtime on the CPU.

    Attributes:
        name: name of the engine.
        digest: identifies what was compiled, and whether it ran.
        open: opens a session; raises CushionError if the engine does not run here.
    """

    name: str
    digest: str
    open: Callable[[], DecoderSession]


@dataclass(frozen=True)
class OpenCompiled(Derived[EngineToRun | None]):
    """A compiled engine for the parity ladder; None if it did not run where it was compiled.

    Attributes:
        compiled: the engine.
        graph: the graph that it was compiled from.
    """

    compiled: Node[CompiledEngine]
    graph: Node[ExportedGraph]

    def make(self, inputs: Inputs) -> EngineToRun | None:
        """Return how to open it."""
        compiled, graph = inputs.get(self.compiled), inputs.get(self.graph)
        artifact = compiled.artifact
        return EngineToRun(artifact.engine, artifact.key, lambda: compiled.open(graph)) if artifact.ran else None

    def digest_of(self, artifact: EngineToRun | None) -> str:
        """Return the digest of the engine; empty for None."""
        return artifact.digest if artifact else ""


@dataclass(frozen=True)
class Compile(Stage[CompiledEngine]):
    """Compile a graph for one engine.

    Attributes:
        graph: the graph to compile.
        engine: name of the engine, a key of ``ENGINES``.
        engine_version: version of the library that compiles.
        options: targets, limits of the optimization profiles, linears that may stay in floating point.
        gpus: GPUs of this machine that the engine could run on. A plan may be built for the first of them, and whether
            it was run is part of the result.
    """

    name: ClassVar[str] = "engine"
    version: ClassVar[int] = 2
    graph: Node[ExportedGraph]
    engine: str
    engine_version: str
    options: CompileOptions
    gpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, graph: Node[ExportedGraph], engine: str, options: CompileOptions) -> Compile:
        """Return the stage for the installed version of the engine's library and the GPUs of this machine."""
        return cls(graph, engine, ENGINES[engine].version(), options, ENGINES[engine].gpus() or ())

    @property
    def label(self) -> str:
        """The name of the stage and of the engine."""
        return f"{self.name}-{self.engine}"

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the engine's files, and run it if it can; raises CheckFailed if too few linears run in INT8."""
        graph = inputs.get(self.graph)
        with elapsed(inputs.progress, f"compiling for {self.engine}"):
            artifact = ENGINES[self.engine].compile(graph, out, self.options)
            CompiledEngine(artifact, out).tried(graph)

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
