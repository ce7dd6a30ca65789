"""The INT8 engine beside the float twin on ONNX Runtime, with and without prefix and INT8 head, in one run.

Ratios of rounds that ran side by side: the machine may be busy, so a lone time says nothing. For one finished bundle
`cushion-deploy bench` does the same.
"""

from __future__ import annotations

import json
from dataclasses import replace

from common import arguments, workspace

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.evaluate.speed import Workload, compare, peak_memory, time_sessions
from cushion_deploy.pipeline.prepare import prepare
from cushion_deploy.pipeline.stages import export, search_prefix
from cushion_deploy.pipeline.workspace import Workspace


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


def main() -> None:
    """Print the comparison as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    workload = Workload(options.prompt, options.decoded, rounds=options.rounds)
    ws = workspace(options, **{"export.quantize_head": False})
    found = graphs(ws, workspace(options, **{"export.quantize_head": True}))
    del ws
    result: dict[str, object] = {
        "bytes": {name: graph.size for name, graph in found.items()},
        "peak_rss": {name: peak_memory(graph, workload, threads=2) for name, graph in found.items()},
    }
    for threads in options.threads:
        sessions: dict[str, DecoderSession] = {
            name: open_session(graph, threads=threads) for name, graph in found.items()
        }
        times = time_sessions(sessions, workload)
        result[f"threads {threads}"] = {
            "measured": {name: row.summary(workload) for name, row in times.items()},
            "times as fast as float": {n: compare(t, times["float"], workload).to_json() for n, t in times.items()},
            "without the prefix, times as fast": compare(times["int8-no-prefix"], times["int8"], workload).to_json(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
