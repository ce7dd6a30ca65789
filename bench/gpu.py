"""Time engines on a GPU with INT8, and with the same model in float16, in interleaved rounds of one run.

Each ratio is given with its spread: the smallest and largest of the rounds beside the median. Nothing here is a test.
``--provider cpu`` runs the part for ONNX Runtime without a GPU, to try the benchmark itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import arguments, new_run, pipeline

from cushion_deploy.core.engine_artifact import ENGINE_FILE
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.session import DecoderSession, remarks
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.compile_graph import compile_graph
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, CUDA, Provider
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.engines.tensorrt.flavours import FLAVOURS
from cushion_deploy.errors import CushionError
from cushion_deploy.evaluate.speed import Times, Workload, time_sessions
from cushion_deploy.runtime.bundle import read_graph
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run

FLOAT = "float16"


def graphs(run: Run, nodes: Pipeline) -> dict[str, ExportedGraph]:
    """Return the float16 graphs to compare: quantized, and the float model without rotations."""
    quantized = run.get(nodes.shipped_quantization)
    form = replace(nodes.form, dtype="float16")
    return {
        "int8": run.get(nodes.graph(Given(quantized), form)),
        FLOAT: run.get(nodes.graph(Given(replace(quantized.float_twin, smoothing=None)), form.float_twin)),
    }


def on_onnxruntime(found: Mapping[str, ExportedGraph], provider: Provider, folder: Path) -> dict[str, DecoderSession]:
    """Return the sessions of ONNX Runtime: float16, INT8 as the provider runs it, and the graph of the engine."""
    (folder / "own").mkdir()
    compile_graph(found["int8"], folder / "own", provider)
    as_it_is = replace(provider, multiplies_floats=False)
    return {
        f"{provider.engine}, {FLOAT}": open_session(found[FLOAT], provider=as_it_is),
        f"{provider.engine}, Q/DQ as the provider runs it": open_session(found["int8"], provider=as_it_is),
        f"{provider.engine}, INT8 codes as float16": open_session(read_graph(folder / "own"), provider=provider),
    }


def as_plans(
    found: Mapping[str, ExportedGraph], engine: str, workload: Workload, folder: Path
) -> dict[str, DecoderSession]:
    """Return the sessions of plans of both graphs for the first GPU."""
    gpus = ENGINES[engine].gpus()
    target = gpus[0].partition(" ")[0] if gpus else ""
    context = workload.prompt + workload.decoded
    options = CompileOptions((target,), workload.batch, context, workload.prompt)
    opened: dict[str, DecoderSession] = {}
    for name, graph in found.items():
        out = folder / f"{engine}-{name}"
        out.mkdir()
        artifact = ENGINES[engine].compile(graph, out, options)
        plan = next(out / file for file in artifact.files if file != ENGINE_FILE)
        opened[f"{engine}, {name}"] = ENGINES[engine].open(graph, plan.read_bytes())
    return opened


def spread(ours: Times, theirs: Times, workload: Workload) -> dict[str, list[float]]:
    """Return how many times as fast ``ours`` is, for prefill and decode: median, smallest and largest round."""
    steps = workload.rounds, workload.decoded
    rounds = {
        "prefill": theirs.prefill / ours.prefill,
        "decode": np.median(theirs.decode.reshape(steps), 1) / np.median(ours.decode.reshape(steps), 1),
    }
    return {
        name: [round(float(value), 3) for value in (np.median(all_), all_.min(), all_.max())]
        for name, all_ in rounds.items()
    }


def compare_with_float(times: Mapping[str, Times], workload: Workload) -> dict[str, Any]:
    """Return the spread of every session against float16 on the same engine."""
    found = {}
    for name, measured in times.items():
        engine, _, kind = name.partition(", ")
        if kind != FLOAT:
            found[name] = spread(measured, times[f"{engine}, {FLOAT}"], workload)
    return found


def main() -> None:
    """Print the comparison as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    workload = Workload(options.prompt, options.decoded, options.batch, options.rounds)
    found = graphs(new_run(options), pipeline(options))
    provider = CUDA if options.provider == "cuda" else replace(CPU, device="cpu", multiplies_floats=True)
    not_run: dict[str, str] = {}
    sessions: dict[str, DecoderSession] = {}
    with TemporaryDirectory(prefix="cushion-bench-") as name, ExitStack() as stack:
        ways: dict[str, Any] = {provider.engine: lambda: on_onnxruntime(found, provider, Path(name))}
        for engine in FLAVOURS if options.provider == "cuda" else ():
            ways[engine] = lambda engine=engine: as_plans(found, engine, workload, Path(name))
        for engine, opened in ways.items():
            try:
                sessions |= opened()
            except CushionError as e:
                not_run[engine] = e.message
        for session in sessions.values():
            stack.enter_context(closing(session))
        times = time_sessions(sessions, workload)
        result = {
            "gpus": ENGINES[CUDA.engine].gpus(),
            "workload": vars(workload),
            "measured": {key: row.summary(workload) for key, row in times.items()},
            "times as fast as float16: median, smallest, largest": compare_with_float(times, workload),
            "remarks": {key: remarks(session) for key, session in sessions.items() if remarks(session)},
            "not run": not_run,
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
