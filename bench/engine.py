"""The INT8 engine beside the float twin on ONNX Runtime, in one run: medians of interleaved rounds, and memory.

Ratios only: the machine may be busy, so a lone time says nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from common import arguments, workspace

from cushion_deploy.pipeline.prepare import prepare
from cushion_deploy.pipeline.stages import export, search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.runtime.session import OnnxRuntimeSession
from cushion_deploy.types import ExportedGraph, Prefix

PROMPT, DECODED, CHUNK = 512, 8, 128


def graphs(ws: Workspace, head_ws: Workspace) -> dict[str, ExportedGraph]:
    """Return the graphs to compare, by name."""
    prefix, _ = search_prefix(ws)
    deployed, bare = prepare(ws, prefix), prepare(ws, Prefix.empty(ws.model.spec))
    with_head = replace(deployed, scheme=head_ws.scheme), replace(bare, scheme=head_ws.scheme)
    return {
        "float": export(ws, deployed, dtype="float32", name="float", quantized=False),
        "int8": export(ws, with_head[0], dtype="float32"),
        "int8-float-head": export(ws, deployed, dtype="float32"),
        "int8-no-prefix": export(ws, with_head[1], dtype="float32"),
    }


def measure(found: dict[str, ExportedGraph], threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each graph for a whole prefill, a prefill for generation, and a decode step."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, next(iter(found.values())).contract.vocab_size, (1, PROMPT + DECODED))
    # One session a graph; the length of a piece is a matter of the call, not of the graph.
    sessions = {n: OnnxRuntimeSession(g.path, g.contract, threads=threads, chunk=CHUNK) for n, g in found.items()}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in found}
    for _ in range(rounds + 1):
        for name, session in sessions.items():
            row = times[name]
            session.chunk = PROMPT
            session.reset()
            clock(row, "prefill, all logits, one piece", lambda s=session: s.run(ids[:, :PROMPT], need_logits="all"))
            session.chunk = CHUNK
            session.reset()
            clock(row, "prefill for generation, chunked", lambda s=session: s.run(ids[:, :PROMPT]))
            for i in range(PROMPT, PROMPT + DECODED):
                clock(row, "decode", lambda s=session, i=i: s.run(ids[:, i : i + 1]))
    # The first round warms up.
    return {n: {k: median(v[len(v) // (rounds + 1) :]) for k, v in row.items()} for n, row in times.items()}


def clock(row: dict[str, list[float]], name: str, call: object) -> None:
    """Append the seconds of one call."""
    begin = time.perf_counter()
    call()  # type: ignore[operator]
    row.setdefault(name, []).append(time.perf_counter() - begin)


def memory(graph: ExportedGraph) -> int:
    """Return the peak resident bytes of a fresh process that loads a graph, prefills and decodes."""
    request = json.dumps({"folder": str(graph.path.parent), "graph": graph.to_json()})
    done = subprocess.run(
        [sys.executable, __file__, "--child"], input=request, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def child() -> None:
    """Load and run the graph described on stdin; print the peak resident bytes."""
    request = json.loads(sys.stdin.read())
    graph = ExportedGraph.from_json(request["graph"], Path(request["folder"]))
    session = OnnxRuntimeSession(graph.path, graph.contract, threads=2, chunk=CHUNK)
    session.run(np.arange(PROMPT, dtype=np.int64)[None])
    session.run(np.array([[1]], dtype=np.int64))
    # Not ru_maxrss: a child inherits that of the process that forked it.
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
    print(int(line.split()[1]) * 1024)


def size(graph: ExportedGraph) -> int:
    """Return the bytes of a graph on disk."""
    return graph.path.stat().st_size + graph.path.with_name(graph.path.name + ".data").stat().st_size


def main() -> None:
    """Print the comparison as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    ws = workspace(options, **{"export.quantize_head": False})
    found = graphs(ws, workspace(options, **{"export.quantize_head": True}))
    del ws
    result: dict[str, object] = {
        "bytes": {name: size(graph) for name, graph in found.items()},
        "peak_rss": {name: memory(graph) for name, graph in found.items()},
    }
    for threads in options.threads:
        times = measure(found, threads, options.rounds)
        ratios = {n: {k: round(times["float"][k] / t, 2) for k, t in row.items()} for n, row in times.items()}
        cost = {k: round(times["int8"][k] / t - 1, 3) for k, t in times["int8-no-prefix"].items()}
        result[f"threads {threads}"] = {"seconds": times, "times faster than float": ratios, "prefix costs": cost}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()
