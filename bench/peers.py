"""Time a bundle beside what people would run instead, on the same machine and in the same rounds.

    python bench/peers.py BUNDLE --model MODEL [--gguf MODEL-Q8_0.gguf] --workload 512x1 2048x1 512x8 --threads 1 2

Every runtime has a process of its own, and all of them take turns in every round; a ratio is the median over rounds.
A runtime that is not installed is left out, and the result says so. Beside the results stand the limits that
`walls.py` measures: what memory and kernels of this machine allow. Prints JSON, and tables on standard error.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentTypeError
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, Any

from common import arguments, new_run, pipeline
from peer import Peer
from walls import Work, measure

from cushion_deploy.core.engine_artifact import ENGINE_FILE
from cushion_deploy.core.host import cpu_description, installed_versions
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run

REFERENCE = "ONNX Runtime FP32"
PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "llama-cpp-python", "torch")


def main() -> None:
    """Print the comparison."""
    parser = arguments(__doc__)
    parser.add_argument("bundle", type=Path, help="the bundle, built from --model")
    parser.add_argument("--gguf", type=Path, default=None, help="the model as Q8_0, for llama.cpp")
    parser.add_argument("--workload", type=_workload, nargs="+", default=[(512, 1)], help="tokens of a prompt x batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decoded", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=None, help="names of runtimes; the reference always runs")
    options = parser.parse_args()
    run, nodes = new_run(options), pipeline(options)
    spec = run.get(nodes.files).spec
    loads = _peers(options, run, nodes, spec)
    work = Work.of(options.bundle / "model.onnx", spec)
    walls = {threads: measure(threads) for threads in options.threads}
    cases = []
    for threads, (prompt, batch) in product(options.threads, options.workload):
        peers = {
            name: replace(peer, prompt=prompt, batch=batch, threads=threads, decoded=options.decoded)
            for name, peer in loads.items()
        }
        case = _case(peers, options.rounds)
        walls[threads] = walls[threads].or_faster(measure(threads))
        cases.append(case | {"limits": work.limits(walls[threads], prompt, batch)})
        _show(cases[-1])
    files = {name: _size(peer) for name, peer in loads.items()}
    machine = {
        "cpu": cpu_description(),
        "versions": installed_versions(PACKAGES),
        "walls": {threads: asdict(found) for threads, found in walls.items()},
    }
    print(json.dumps({"machine": machine, "file_bytes": files, "cases": cases}, indent=1))


def _workload(text: str) -> tuple[int, int]:
    """Return the tokens of a prompt and the batch that ``512x8`` means."""
    prompt, _, batch = text.partition("x")
    if not (prompt.isdigit() and batch.isdigit() and int(prompt) and int(batch)):
        raise ArgumentTypeError(f"{text!r} is no prompt and batch, such as 512x1")
    return int(prompt), int(batch)


def _peers(options: Any, run: Run, nodes: Pipeline, spec: ModelSpec) -> dict[str, Peer]:
    """Return what to compare by name, without a workload; the float graph is exported as people would have it."""
    folder = run.get(nodes.model.converted) if nodes.model.converted else nodes.source.path
    bare = Quantization(Prefix.empty(spec), nodes.scheme)
    graph = run.get(nodes.graph(Given(bare), replace(nodes.form, quantized=False, prefix="none")))
    kinds = {
        REFERENCE: ("onnxruntime", graph.path, ""),
        **{
            f"cushion-deploy, {engine.parent.name}": ("bundle", options.bundle, engine.parent.name)
            for engine in sorted((options.bundle / "engines").glob(f"*/{ENGINE_FILE}"))
        },
        "OpenVINO, float graph": ("openvino", graph.path, ""),
        "OpenVINO, model.onnx of the bundle": ("openvino", options.bundle / "model.onnx", ""),
        "onnxruntime-genai, the bundle": ("genai", options.bundle, ""),
        "torch bfloat16": ("torch", folder, ""),
    }
    if options.gguf:
        kinds["llama.cpp Q8_0"] = ("llama.cpp", options.gguf, "")
    found = {name: Peer(kind, str(path), 1, 1, 1, 1, engine) for name, (kind, path, engine) in kinds.items()}
    wanted = {REFERENCE, *(options.only or found)}
    return {name: peer for name, peer in found.items() if name in wanted}


@dataclass
class Child:
    """A runtime in its process; ``missing`` says why it does not run."""

    process: subprocess.Popen[str]
    errors: IO[str]
    load: float = 0.0
    missing: str = ""

    @classmethod
    def start(cls, peer: Peer) -> Child:
        """Load the peer's model in a process of its own."""
        threads = {name: str(peer.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # A file, because a library that prints more than a pipe holds would wait for a reader.
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | threads,
        )
        child = cls(process, errors)
        answer = child.ask(json.dumps(asdict(peer)))
        child.load = answer.get("load", 0.0)
        return child

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer; an empty one if the process has ended, and why is in ``missing``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        self.process.communicate()
        self.errors.seek(0)
        said = (self.errors.read().strip().splitlines() or ["nothing"])[-1][:300]
        code = self.process.returncode
        ended = f"ended by {signal.Signals(-code).name}, last line: " if code < 0 else ""
        self.missing = self.missing or ended + said
        return {}

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.communicate()


def _case(peers: dict[str, Peer], rounds: int) -> dict[str, Any]:
    """Return the measurements of one workload."""
    children = {name: Child.start(peer) for name, peer in peers.items()}
    prefill: dict[str, list[float]] = {name: [] for name in peers}
    decode: dict[str, list[float]] = {name: [] for name in peers}
    peak: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, child in children.items():
            if child.missing:
                continue
            first, then = child.ask("prefill"), {}
            if first:
                then = child.ask("decode")
            if then:
                prefill[name].append(first["seconds"][0])
                decode[name].append(statistics.median(then["seconds"]))
                peak[name] = then["peak"]
    for child in children.values():
        child.close()
    peer = next(iter(peers.values()))
    rows: dict[str, Any] = {}
    for name, child in children.items():
        if child.missing or len(prefill[name]) < 2:
            rows[name] = {"missing": child.missing or "no round was finished"}
            continue
        ratios = {
            kind: statistics.median(a / b for a, b in zip(times[REFERENCE][1:], times[name][1:], strict=False))
            for kind, times in (("prefill", prefill), ("decode", decode))
            if times[REFERENCE]
        }
        rows[name] = {
            "prefill_tokens_per_second": peer.batch * peer.prompt / statistics.median(prefill[name][1:]),
            "decode_tokens_per_second": peer.batch / statistics.median(decode[name][1:]),
            "times_the_reference": ratios,
            "load_seconds": child.load,
            "peak_memory_bytes": peak[name],
        }
    return {"prompt": peer.prompt, "batch": peer.batch, "threads": peer.threads, "rounds": rounds, "rows": rows}


def _show(case: dict[str, Any]) -> None:
    title = f"prompt {case['prompt']}, batch {case['batch']}, threads {case['threads']}"
    print(f"\n{title:38} prefill tok/s    x  decode tok/s    x   MB  load s", file=sys.stderr)
    for name, row in case["rows"].items():
        if "missing" in row:
            print(f"{name:38} not run: {row['missing']}", file=sys.stderr)
            continue
        ratio = row["times_the_reference"]
        print(
            f"{name:38} {row['prefill_tokens_per_second']:13.0f} {ratio.get('prefill', 0):4.2f} "
            f"{row['decode_tokens_per_second']:13.1f} {ratio.get('decode', 0):4.2f} "
            f"{row['peak_memory_bytes'] / 1e6:4.0f} {row['load_seconds']:7.1f}",
            file=sys.stderr,
        )
    limits = case["limits"]
    for name, prefill in (("prefill_linears", "limit, INT8 linears"), ("prefill", "limit, and attention in float32")):
        print(f"{prefill:38} {limits[name]:13.0f} {limits['decode']:18.1f}", file=sys.stderr)


def _size(peer: Peer) -> int:
    """Return the bytes of what a runtime loads."""
    path = Path(peer.path)
    if peer.kind in ("bundle", "genai"):
        engine = _files(path / "engines" / peer.engine) if peer.engine else 0
        return engine + _files(path / "model.onnx")
    return _files(path)


def _files(path: Path) -> int:
    """Return the bytes of a folder, a file, or a graph and its weights."""
    files = (
        path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*" if path.suffix == ".onnx" else path.name)
    )
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
