"""The bench of a bundle: its engines beside the same model in floating point, in one run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.evaluate.speed import Comparison, Times, Workload, compare, peak_memory, time_sessions
from cushion_deploy.pipeline.prepare import read_deployed
from cushion_deploy.pipeline.stages import export
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.runtime.onnxruntime import open_session
from cushion_deploy.runtime.session import DecoderSession
from cushion_deploy.types import ExportedGraph

INT8, FLOAT = "onnxruntime, INT8", "onnxruntime, float32"
FASTER = 1.02
"""From this ratio on one engine counts as faster; below it is noise."""


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        workload: what ran.
        times: by engine.
        memory, files: peak resident bytes, and bytes on disk, by engine.
        ratio: INT8 against floating point; None where there is no float twin.
        not_run: engines of the bundle that did not run, and why.
    """

    workload: Workload
    times: dict[str, Times]
    memory: dict[str, int]
    files: dict[str, int]
    ratio: Comparison | None
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One sentence that says whether INT8 is faster."""
        if self.ratio is None:
            return "Nothing to compare with: the float twin was left out."
        parts = [(name, getattr(self.ratio, name)) for name in ("prefill", "decode")]
        slower = [name for name, ratio in parts if ratio < FASTER]
        said = " and ".join(f"{ratio:.2f} times as fast in {name}" for name, ratio in parts)
        if not slower:
            return f"INT8 runs {said} as floating point."
        return f"INT8 is not faster in {' and '.join(slower)} here: it runs {said} as floating point."

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "workload": asdict(self.workload),
            "engines": {
                name: {
                    **times.summary(self.workload),
                    "peak_memory_bytes": self.memory[name],
                    "file_bytes": self.files[name],
                }
                for name, times in self.times.items()
            },
            "int8_against_float": self.ratio.to_json() if self.ratio else None,
            "not_run": self.not_run,
            "verdict": self.verdict,
        }


def bench_bundle(
    ws: Workspace, bundle: Path, graph: ExportedGraph, workload: Workload, *, threads: int | None, twin: bool = True
) -> Bench:
    """Time a verified bundle's engines, and the float twin that is exported from the original model.

    Args:
        ws: whose recipe names the original model.
        bundle, graph: what is timed.
        workload: what runs.
        threads: of every engine; None for one per core.
        twin: False leaves the float twin out, and the original model is not needed.

    Raises:
        UsageError: the workload does not fit into the model, or the model is not at hand.
    """
    workload.check(graph.contract)
    graphs = {INT8: graph}
    if twin:
        with ws.store.lock():
            deployed = read_deployed(ws, bundle, graph)
            graphs[FLOAT] = export(ws, deployed, dtype="float32", name="float", quantized=False)
    sessions: dict[str, DecoderSession] = {name: open_session(g, threads=threads) for name, g in graphs.items()}
    times = time_sessions(sessions, workload, ws.progress)
    sessions.clear()
    memory = {name: peak_memory(g, workload, threads) for name, g in graphs.items()}
    ratio = compare(times[INT8], times[FLOAT], workload) if twin else None
    files = {name: g.size for name, g in graphs.items()}
    return Bench(workload, times, memory, files, ratio, _not_run(bundle))


def _not_run(bundle: Path) -> dict[str, str]:
    """Return the engines of a bundle that are compiled and cannot run here, with the reason in their report."""
    found = {}
    for name in ENGINES:
        file = bundle / "engines" / name / "engine.json"
        if name != "onnxruntime" and file.is_file():
            details = json.loads(file.read_text(encoding="utf-8")).get("details", {})
            found[name] = str(details.get("not_run") or "running it is not supported yet")
    return found
