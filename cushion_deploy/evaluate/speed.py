"""Speed of several decoders, timed in interleaved rounds so that load on the machine affects all of them equally.

Peak memory is measured in a child process that loads one graph, runs the prompt and decodes one token:
``python -m cushion_deploy.evaluate.speed`` with the graph as JSON on stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.host import free_memory, own_peak_memory
from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.core.session import DecoderSession, context_limit
from cushion_deploy.engines.probe import child_environment, package_root
from cushion_deploy.engines.registry import find_engine
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import DEFAULT_ENGINE, open_engine
from cushion_deploy.store.files import human_bytes

LATENCIES = (50, 90, 99)
"""Reported percentiles of the decode step latency."""


@dataclass(frozen=True)
class Workload:
    """The timed workload.

    Attributes:
        prompt: number of prompt tokens.
        decoded: number of decode steps after the prompt.
        batch: number of sequences.
        rounds: number of counted rounds; one more warm-up round is not counted.
    """

    prompt: int = 512
    decoded: int = 32
    batch: int = 1
    rounds: int = 5

    def check(self, contract: GraphContract) -> None:
        """Raise UsageError if the workload does not fit into the context, or into the free memory."""
        room = context_limit(contract)
        if self.prompt + self.decoded > room:
            raise UsageError(
                f"a prompt of {self.prompt} and {self.decoded} steps do not fit into the {room} positions of the model",
                hint="lower --prompt or --decoded",
            )
        with suppress(ModuleNotFoundError):  # psutil, which only the extra `build` installs
            free, needed = free_memory(), self.cache_bytes(contract)
            if needed > free:
                raise UsageError(
                    f"the keys and values of {self.batch:,} sequences of {self.prompt + self.decoded:,} tokens take "
                    f"{human_bytes(needed)}, and {human_bytes(free)} of memory are free",
                    hint="lower --batch, --prompt or --decoded",
                )

    def cache_bytes(self, contract: GraphContract) -> int:
        """Return the bytes of the keys and values of every sequence in float32, as the float model has them."""
        vectors = 2 * contract.num_layers * contract.num_kv_heads * (self.prompt + self.decoded)
        return self.batch * vectors * contract.head_dim * np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class Times:
    """Seconds of every counted prefill ``[rounds]``, and of every decode step ``[rounds * decoded]``."""

    prefill: FloatArray
    decode: FloatArray

    def summary(self, workload: Workload) -> dict[str, Any]:
        """Return median tokens per second, and decode step latencies in milliseconds."""
        return {
            "prefill_tokens_per_second": workload.batch * workload.prompt / float(np.median(self.prefill)),
            "decode_tokens_per_second": workload.batch / float(np.median(self.decode)),
            "decode_milliseconds": {f"p{p}": 1e3 * float(np.percentile(self.decode, p)) for p in LATENCIES},
        }


@dataclass(frozen=True)
class Comparison:
    """Speed-up of the first decoder over the second: the median ratio over paired rounds."""

    prefill: float
    decode: float

    def to_json(self) -> dict[str, float]:
        """Return a JSON-ready dict."""
        return asdict(self)


def time_sessions(
    sessions: Mapping[str, DecoderSession], workload: Workload, progress: Progress = silent
) -> dict[str, Times]:
    """Return the times of every session; the sessions take turns in every round.

    Args:
        sessions: sessions by name; their caches are emptied.
        workload: what each session runs.
        progress: receives the number of finished rounds.

    Raises:
        UsageError: the workload does not fit into the model's positions.
    """
    for session in sessions.values():
        workload.check(session.contract)
    vocabulary = min(session.contract.vocab_size for session in sessions.values())
    shape = (workload.batch, workload.prompt + workload.decoded)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int64)
    prefill: dict[str, list[float]] = {name: [] for name in sessions}
    decode: dict[str, list[float]] = {name: [] for name in sessions}

    def play() -> None:
        for name, session in sessions.items():
            session.reset()
            begin = time.perf_counter()
            session.run(ids[:, : workload.prompt])
            prefill[name].append(time.perf_counter() - begin)
            for i in range(workload.prompt, shape[1]):
                begin = time.perf_counter()
                session.run(ids[:, i : i + 1])
                decode[name].append(time.perf_counter() - begin)

    with elapsed(progress, "warm-up round"):
        play()
    for done in range(workload.rounds):
        play()
        progress("timed rounds", done + 1, workload.rounds)
    steps = workload.decoded
    return {
        name: Times(np.array(prefill[name][1:], np.float32), np.array(decode[name][steps:], np.float32))
        for name in sessions
    }


def compare(ours: Times, theirs: Times, workload: Workload) -> Comparison:
    """Return the speed-up of ``ours`` over ``theirs``, with paired rounds."""
    steps = workload.rounds, workload.decoded
    return Comparison(
        float(np.median(theirs.prefill / ours.prefill)),
        float(np.median(np.median(theirs.decode.reshape(steps), 1) / np.median(ours.decode.reshape(steps), 1))),
    )


def peak_memory(
    graph: ExportedGraph,
    workload: Workload,
    threads: int | None = None,
    engine: str = DEFAULT_ENGINE,
    bundle: Path | None = None,
) -> int:
    """Return the peak resident bytes of a fresh process that runs a graph on an engine.

    Args:
        graph: the graph.
        workload: its prompt and batch.
        threads: threads of the engine.
        engine: an engine on the CPU.
        bundle: the bundle of the graph, which then runs as it is deployed; None for a graph of no bundle.

    Raises:
        CheckFailed: the process fails.
    """
    request = {
        "folder": str(graph.path.parent.resolve()),
        "graph": graph.to_json(),
        "workload": asdict(workload),
        "threads": threads,
        "engine": engine,
        "bundle": str(bundle.resolve()) if bundle else None,
    }
    done = subprocess.run(
        [sys.executable, "-m", "cushion_deploy.evaluate.speed"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        cwd=package_root(),
        env=child_environment(),
    )
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CheckFailed(f"the process that measures memory failed: {error}", hint="free some memory and run it again")
    return int(done.stdout)


def _child() -> None:
    request = json.loads(sys.stdin.read())
    graph = ExportedGraph.from_json(request["graph"], Path(request["folder"]))
    workload = Workload(**request["workload"])
    engine, threads = request["engine"], request["threads"]
    if request["bundle"]:
        session = open_engine(open_bundle(request["bundle"]), engine, threads)
    else:
        session = find_engine(engine).open(graph, threads=threads)
    session.run(np.zeros((workload.batch, workload.prompt), dtype=np.int64))
    session.run(np.zeros((workload.batch, 1), dtype=np.int64))
    print(own_peak_memory())


if __name__ == "__main__":
    _child()
