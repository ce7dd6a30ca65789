"""Benchmark a bundle: time its engines and the same model in floating point in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cushion_deploy.core.engine_artifact import ENGINE_FILE
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.core.session import DecoderSession, remarks
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.kernels import kernels_in_words
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import CushionError
from cushion_deploy.evaluate.speed import Comparison, Times, Workload, compare, peak_memory, time_sessions
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.engine import DEFAULT_ENGINE, is_built_for, open_engine, read_engine
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.engine_graph import engine_form
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.plan_type import has_plan_type
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.run import Run
from cushion_deploy.store.files import temporary_folder
from cushion_deploy.verbs.parity import pipeline_of_bundle

CPU_ENGINE, INT8 = DEFAULT_ENGINE, "INT8"
FASTER = 1.02
"""Minimum speed ratio that counts as faster; anything below is noise."""


@dataclass(frozen=True)
class Bench:
    """Results of a benchmark.

    Attributes:
        workload: the workload that was timed.
        times: measured times by engine and type, e.g. ``onnxruntime, INT8``.
        memory: peak resident bytes on the CPU; bytes of device memory on a GPU.
        files: bytes on disk of the graphs that ran on the CPU.
        ratios: for each engine, INT8 compared with floating point; empty without float twins.
        not_run: engines of the bundle that did not run, with the reason.
        kernels: what ONNX Runtime multiplies on this processor.
        remarks: by engine, what it multiplies where that is not INT8, and where its nodes run.
    """

    workload: Workload
    times: dict[str, Times]
    memory: dict[str, int]
    files: dict[str, int]
    ratios: dict[str, Comparison]
    not_run: dict[str, str] = field(default_factory=dict)
    kernels: str = ""
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One sentence per engine that says whether INT8 is faster there."""
        if not self.ratios:
            return ("Nothing to compare with: the float model was left out (--no-float).",)
        kinds = {engine: kind for engine, _, kind in map(_split, self.times) if kind.startswith(INT8)}
        return tuple(_verdict(engine, kinds.get(engine, INT8), ratio) for engine, ratio in self.ratios.items())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "workload": asdict(self.workload),
            "engines": {
                name: {
                    **times.summary(self.workload),
                    "peak_memory_bytes": self.memory.get(name),
                    "file_bytes": self.files.get(name),
                }
                for name, times in self.times.items()
            },
            "int8_against_float": {engine: ratio.to_json() for engine, ratio in self.ratios.items()},
            "not_run": self.not_run,
            "kernels": self.kernels,
            "remarks": {engine: list(said) for engine, said in self.remarks.items()},
            "verdicts": list(self.verdicts),
        }


def _split(name: str) -> tuple[str, str, str]:
    """Return the engine of what was timed under a name, a separator, and the kind of its linears."""
    return name.partition(", ")


def _kind(engine: str, session: DecoderSession) -> str:
    """Return what the linears of a bundle multiply on an engine: INT8, or the values of the codes in another type."""
    multiplies_floats = ENGINES[engine].compiles_to == "graph" and has_plan_type(engine)
    return f"{INT8} codes as {session.contract.dtype}" if multiplies_floats else INT8


def _verdict(engine: str, kind: str, ratio: Comparison) -> str:
    parts = [(name, getattr(ratio, name)) for name in ("prefill", "decode")]
    slower = [name for name, value in parts if value < FASTER]
    ratios = " and ".join(f"{value:.2f} times as fast in {name}" for name, value in parts)
    if not slower:
        return f"On {engine}, {kind} runs {ratios} as floating point."
    return f"On {engine}, {kind} is not faster in {' and '.join(slower)}: it runs {ratios} as floating point."


def bench_bundle(
    recipe: Recipe,
    run: Run,
    bundle: Bundle,
    workload: Workload,
    *,
    threads: int | None,
    twin: bool = True,
    engines: Sequence[str] = (),
) -> Bench:
    """Time the engines of a verified bundle, each together with a float twin exported from the original model.

    Args:
        recipe: the recipe of the bundle; it names the original model.
        run: the work folder.
        bundle: the bundle to time.
        workload: the workload to run.
        threads: threads of every engine on the CPU; None for one per core.
        twin: False skips the float twins; the original model is then not needed.
        engines: engines to time beside ONNX Runtime on the CPU; empty for those that the bundle was built for.

    Raises:
        UsageError: the workload does not fit the model, or the original model is not available.
    """
    workload.check(bundle.contract)
    graphs = {f"{CPU_ENGINE}, {INT8}": bundle.graph}
    plans, not_run = _open_others(bundle, engines, threads, run.progress)
    sessions: dict[str, DecoderSession] = {}
    try:
        with run.lock() if twin else nullcontext():
            twins = _Twins(pipeline_of_bundle(recipe, bundle.path), run, bundle, threads) if twin else None
            if twins:
                graphs[f"{CPU_ENGINE}, float32"] = twins.graph()
            for name, graph in graphs.items():
                with elapsed(run.progress, f"loading {name}"):
                    sessions[name] = open_session(graph, threads=threads)
            for engine, session in plans.items():
                try:
                    with elapsed(run.progress, f"first prompt on {engine}"):
                        sessions |= _ready(engine, session, twins, workload)
                except CushionError as e:  # a plan that cannot run the workload must not stop the others
                    not_run[engine] = f"not run: {e.message}"
        times = time_sessions(sessions, workload, run.progress)
        memory = {name: size for name, s in sessions.items() if (size := getattr(s, "device_bytes", 0))}
        said = {engine: found for engine, session in plans.items() if (found := remarks(session))}
    finally:
        for session in (*sessions.values(), *plans.values()):
            session.close()
    for name in [each for each in times if _in_host_memory(each)]:
        engine, _, kind = _split(name)
        graphs[name] = graphs[f"{CPU_ENGINE}, {kind}"]
        # What is deployed for ONNX Runtime is the graph itself.
        deployed = bundle.path if kind == INT8 and engine != CPU_ENGINE else None
        with elapsed(run.progress, f"measuring the memory of {name}"):
            memory[name] = peak_memory(graphs[name], workload, threads, engine, deployed)
    return Bench(
        workload,
        times,
        memory,
        {name: g.size for name, g in graphs.items()},
        _ratios(times, workload),
        not_run,
        kernels_in_words(),
        said,
    )


def _in_host_memory(name: str) -> bool:
    """Return whether what was timed under a name runs the bundle's graph, or its twin, in the memory of the CPU."""
    engine = ENGINES[_split(name)[0]]
    return engine.name == CPU_ENGINE or engine.compiles_to == "blob"


def _ratios(times: Mapping[str, Times], workload: Workload) -> dict[str, Comparison]:
    """Return the comparison of INT8 with floating point for every engine that ran both."""
    ours: dict[str, Times] = {}
    twins: dict[str, Times] = {}
    for name in times:
        engine, _, kind = _split(name)
        (ours if kind.startswith(INT8) else twins)[engine] = times[name]
    return {engine: compare(ours[engine], theirs, workload) for engine, theirs in twins.items()}


def _ready(engine: str, plan: DecoderSession, twins: _Twins | None, workload: Workload) -> dict[str, DecoderSession]:
    """Return the sessions of a plan and its float twin by name, after both have run the workload's prompt once."""
    found = {f"{engine}, {_kind(engine, plan)}": plan}
    try:
        if twins:
            dtype, session = twins.open(engine)
            found[f"{engine}, {dtype}"] = session
        for each in found.values():
            each.run(np.zeros((workload.batch, workload.prompt), dtype=np.int64), need_logits="none")
            each.reset()
    except CushionError:
        for each in found.values():
            each.close()
        raise
    return found


def _open_others(
    bundle: Bundle, names: Sequence[str], threads: int | None, progress: Progress
) -> tuple[dict[str, DecoderSession], dict[str, str]]:
    """Open a session on every engine but ONNX Runtime on the CPU; return the reasons of those that do not run here.

    Raises:
        CushionError: an engine in ``names`` does not run here.
    """
    opened: dict[str, DecoderSession] = {}
    reasons: dict[str, str] = {}
    for engine in names or [name for name in ENGINES if is_built_for(bundle, name)]:
        if engine == CPU_ENGINE:
            continue
        try:
            with elapsed(progress, f"loading {engine}"):
                opened[engine] = open_engine(bundle, engine, threads)
        except CushionError as e:
            if names:
                raise
            reasons[engine] = f"not run: {e.message}"
    return opened, reasons


@dataclass(frozen=True)
class _Twins:
    """Float twins of a bundle's graph and plans, made from the original model."""

    pipeline: Pipeline
    run: Run
    bundle: Bundle
    threads: int | None

    def graph(self, form: GraphForm | None = None, in_place_context: int = 0) -> ExportedGraph:
        """Return the graph in floating point, in the form of the bundle's or another."""
        quantization = read_quantization(self.bundle.path, self.bundle.graph, self.pipeline.scheme)
        # As a float model is deployed: without the rotations, which only help quantization.
        twin = Given(replace(quantization.float_twin, smoothing=None))
        return self.run.get(self.pipeline.graph(twin, (form or self.pipeline.form).float_twin, in_place_context))

    def open(self, engine: str) -> tuple[str, DecoderSession]:
        """Return the type and a session of the same model without INT8 on an engine."""
        if ENGINES[engine].compiles_to == "plan":
            return self._plan(engine)
        form, built = self.pipeline.form, ENGINES[engine].compiles_to == "graph" and is_built_for(self.bundle, engine)
        dtype = read_engine(self.bundle, engine).form[0] if built else form.dtype
        graph = self.graph(replace(form, dtype=dtype))
        return graph.contract.dtype, ENGINES[engine].open(graph, threads=self.threads)

    def _plan(self, engine: str) -> tuple[str, DecoderSession]:
        """Compile the same model without INT8 for an engine's targets, within the same limits; return type, session."""
        artifact = read_engine(self.bundle, engine)
        limits, dtype = artifact.details["limits"], artifact.form[0]
        # Its cache is what a float build would have: static where it can be, beside an INT8 cache too.
        form = self.pipeline.form.float_twin
        graph = self.graph(*engine_form(form, ENGINES[engine], dtype, limits["context"]))
        options = CompileOptions(artifact.targets, limits["batch"], limits["context"], limits["prefill"])
        # Compiled anew in a private folder: opening a plan runs code, and others may be able to write to a work folder.
        with temporary_folder("cushion-bench-") as folder:
            made = ENGINES[engine].compile(graph, folder, options)
            plan = next(folder / file for file in made.files if file != ENGINE_FILE).read_bytes()
        return dtype, ENGINES[engine].open(graph, plan)
