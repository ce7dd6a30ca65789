"""Time the INT8 engine and the float twin on ONNX Runtime, with and without prefix and INT8 head, in one run.

The results are ratios of interleaved rounds, because absolute times on a busy machine mean little. To time one
finished bundle, use `cushion-deploy bench`.
"""

from __future__ import annotations

import json
from dataclasses import replace

from common import arguments, new_run, pipeline

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.evaluate.speed import Workload, compare, peak_memory, time_sessions
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.study.cells import UNROTATED


def graphs(run: Run, nodes: Pipeline, with_head: Pipeline) -> dict[str, ExportedGraph]:
    """Return the graphs to compare, by name."""
    quantized, bare = (run.get(branch.quantization) for branch in (nodes.quantized, nodes.bare))
    unrotated = run.get(nodes.altered(UNROTATED).quantized.quantization)
    head = with_head.scheme
    wanted = {
        # As a float model is deployed, without rotations.
        "float": (replace(quantized.float_twin, smoothing=None), replace(nodes.form, quantized=False)),
        "int8": (replace(quantized, scheme=head), nodes.form),
        "int8-float-head": (quantized, nodes.form),
        "int8-no-prefix": (replace(bare, scheme=head), nodes.form),
        "int8-no-rotation": (replace(unrotated, scheme=head), nodes.form),
    }
    return {name: run.get(nodes.graph(Given(parts), form)) for name, (parts, form) in wanted.items()}


def main() -> None:
    """Print the comparison as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    workload = Workload(options.prompt, options.decoded, rounds=options.rounds)
    float_head, int8_head = (pipeline(options, **{"export.quantize_head": head}) for head in (False, True))
    found = graphs(new_run(options), float_head, int8_head)
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
            "without rotations, times as fast": compare(times["int8-no-rotation"], times["int8"], workload).to_json(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
