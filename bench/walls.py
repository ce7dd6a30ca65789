"""What no runtime can exceed on this machine: how fast memory is read, and how fast INT8 and float32 are multiplied.

    python bench/walls.py --threads 1 2

A decode step reads every weight and the cache once, so it is bounded by memory; a prompt by the products of its
linears, and, where attention stays in float32, by those too. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cushion_deploy.core.model_spec import ModelSpec

REPEATS = 20
"""The fastest counts: a wall is a maximum, and other work on the machine only slows it down."""
STREAM = 2**28
"""Bytes read in one go: more than the cache that one of these machines' cores has to itself."""
ROWS, WIDTH = 512, 2048
"""Shape of the measured product: ``[512, 2048] x [2048, 2048]``, large enough to leave nothing but the kernel."""


@dataclass(frozen=True)
class Walls:
    """Measured maxima with a number of threads; a multiplication and its addition are two operations."""

    read_bytes_per_second: float
    int8_operations_per_second: float
    float32_operations_per_second: float

    def or_faster(self, other: Walls) -> Walls:
        """Return the larger of both measurements of each wall: other work on the machine lowers them."""
        return Walls(*map(max, asdict(self).values(), asdict(other).values()))


@dataclass(frozen=True)
class Work:
    """What a token costs, whatever the runtime.

    Attributes:
        weight_bytes: weights that a decode step reads.
        cache_bytes: keys and values of one token of context.
        linear_operations: those of the quantized linears for one token.
        attention_operations: those of both products of attention for one query and one key.
    """

    weight_bytes: int
    cache_bytes: int
    linear_operations: int
    attention_operations: int

    @classmethod
    def of(cls, graph: Path, spec: ModelSpec) -> Work:
        """Count the initializers of a graph; a table from which rows are gathered is read by no step as a whole."""
        model = onnx.load(graph, load_external_data=False).graph
        readers = defaultdict(set)
        for node in model.node:
            for name in node.input:
                readers[name].add(node.op_type)
        read = [t for t in model.initializer if readers[t.name] != {"Gather"}]
        size = {t.name: onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize * prod(t.dims) for t in read}
        codes = [t for t in read if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
        return cls(
            weight_bytes=sum(size.values()),
            cache_bytes=2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * np.dtype(np.float32).itemsize,
            linear_operations=sum(2 * prod(t.dims) for t in codes if "Gather" not in readers[t.name]),
            attention_operations=4 * spec.num_layers * spec.num_heads * spec.head_dim,
        )

    def limits(self, walls: Walls, prompt: int, batch: int) -> dict[str, float]:
        """Return the most tokens per second: in decode after a prompt, and in prefill without and with attention."""
        decode = (self.weight_bytes + batch * prompt * self.cache_bytes) / walls.read_bytes_per_second
        linears = self.linear_operations / walls.int8_operations_per_second
        # A query attends to half of the prompt on average.
        attention = self.attention_operations * (prompt + 1) / 2 / walls.float32_operations_per_second
        return {"decode": batch / decode, "prefill_linears": 1 / linears, "prefill": 1 / (linears + attention)}


def measure(threads: int) -> Walls:
    """Return the walls, measured in a process of its own, because libraries read their number of threads once."""
    settings = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, __file__, "--here", "--threads", str(threads)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the walls cannot be measured: {done.stderr.strip()[-300:]}")
    return Walls(**json.loads(done.stdout))


def _measure_here(threads: int) -> Walls:
    rng = np.random.default_rng(0)
    stream = np.ones(STREAM // 4, np.float32)
    codes = rng.integers(0, 256, (ROWS, WIDTH)).astype(np.uint8)
    weights = rng.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8)
    operations = 2 * ROWS * WIDTH * WIDTH
    int8 = _product("MatMulInteger", codes, weights, threads)
    float32 = _product("MatMul", codes.astype(np.float32), weights.astype(np.float32), threads)
    return Walls(
        # Two operands at the same address: every byte is read from memory once.
        read_bytes_per_second=STREAM / _fastest(lambda: np.dot(stream, stream)),
        int8_operations_per_second=operations / _fastest(int8),
        float32_operations_per_second=operations / _fastest(float32),
    )


def _product(op: str, x: Any, weight: Any, threads: int) -> Callable[[], object]:
    """Return a call that multiplies in ONNX Runtime, whose kernels were the fastest in a trial with torch and numpy."""
    import onnxruntime as ort

    y = onnx.TensorProto.INT32 if weight.dtype == np.int8 else onnx.TensorProto.FLOAT
    ports = [
        onnx.helper.make_tensor_value_info(name, dtype, [ROWS, WIDTH])
        for name, dtype in (("x", onnx.helper.np_dtype_to_tensor_dtype(x.dtype)), ("y", y))
    ]
    node = onnx.helper.make_node(op, ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph(
        [node], "wall", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weight, "weight")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _fastest(call: Callable[[], object]) -> float:
    """Return the shortest time of a call in seconds."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Print the walls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--here", action="store_true", help="measure in this process, for one number of threads")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(asdict(_measure_here(options.threads[0]))))
        return
    print(json.dumps({threads: asdict(measure(threads)) for threads in options.threads}, indent=1))


if __name__ == "__main__":
    main()
