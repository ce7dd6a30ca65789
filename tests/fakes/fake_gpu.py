"""A fake device: `cuda.bindings.runtime` and TensorRT as far as a session uses them, with every contract checked.

Memory is bytes at made-up addresses. Queued work runs at synchronization and not before, so that a read too early sees
nothing, and a buffer or host array that was freed too early is detected. A plan is JSON that names an ONNX graph;
running it runs that graph in ONNX Runtime, on the bytes at the bound addresses. CUDA graphs are in `fake_graphs.py`.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from fake_graphs import FakeGraphs, Status, Work

from cushion_deploy.parity.rounding import widen

BF16 = 16
TYPES = {
    1: ("FLOAT", np.float32),
    10: ("HALF", np.float16),
    7: ("INT64", np.int64),
    3: ("INT8", np.int8),
    BF16: ("BF16", np.uint16),
}


class Kind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class FakeCuda(FakeGraphs):
    """`cuda.bindings.runtime` of one device with ``capacity`` bytes."""

    cudaMemcpyKind = Kind

    def __init__(self, capacity: int = 1 << 30) -> None:
        super().__init__()
        self.capacity, self.used, self.next = capacity, 0, 0x7000_0000
        self.memory: dict[int, bytearray] = {}
        self.broken = False

    def find(self, address: int, size: int) -> memoryview:
        """Return the bytes at an address; a fault where they are not one live allocation."""
        for start, data in self.memory.items():
            if start <= address and address + size <= start + len(data):
                return memoryview(data)[address - start : address - start + size]
        raise AssertionError(f"illegal access to {size} bytes at {address:#x}")

    def cudaStreamCreate(self) -> tuple[Status, int]:
        self.streams.add(len(self.streams) + 1)
        return Status.cudaSuccess, len(self.streams)

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.remove(stream)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream in self.streams
        self.require_not_recording()
        if self.broken:
            self.queue.clear()
            return (Status.cudaErrorIllegalAddress,)
        work, self.queue = self.queue, []
        for item in work:
            item()
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        assert size > 0
        self.require_not_recording()
        if self.used + size > self.capacity:
            return Status.cudaErrorMemoryAllocation, 0
        self.used += size
        address, self.next = self.next, self.next + (size + 0xFFF) // 0x1000 * 0x1000 + 0x1000
        # NaN in every floating-point type: unwritten memory must not look valid.
        self.memory[address] = bytearray(b"\xff" * size)
        return Status.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Status]:
        assert not self.queue, "memory was freed while work was queued"
        self.require_not_recording()
        self.used -= len(self.memory.pop(address))
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return Status.cudaSuccess, self.capacity - self.used, self.capacity

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Status]:
        return self.cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, to: int, source: int, pitch: int, width: int, rows: int, kind: Kind, stream: int
    ) -> tuple[Status]:
        assert stream in self.streams
        assert width <= min(to, pitch)
        self.require_not_recording()  # a launch would access host memory that is freed by then

        def copy() -> None:
            for row in range(rows):
                here, there = source + row * pitch, target + row * to
                if kind is Kind.cudaMemcpyHostToDevice:
                    data = ctypes.string_at(here, width)
                else:
                    data = bytes(self.find(here, width))
                if kind is Kind.cudaMemcpyDeviceToHost:
                    ctypes.memmove(there, data, width)
                else:
                    self.find(there, width)[:] = data

        self.queue.append(copy)
        return (Status.cudaSuccess,)

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Status]:
        assert stream in self.streams
        assert 0 < width <= pitch
        self.require_not_recording()

        def fill() -> None:
            for row in range(height):
                self.find(address + row * pitch, width)[:] = bytes([value]) * width

        self.queue.append(fill)
        return (Status.cudaSuccess,)


class FakeTensorRt:
    """The module `tensorrt_rtx` or `tensorrt` on a :class:`FakeCuda`."""

    __version__ = "1.7.1.116"

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.executed: list[int] = []
        self.records = "yes"
        """Whether a step can be captured: ``yes``, ``no`` if the context says so, ``fails`` if capturing it fails."""
        outer = self

        class Logger:
            WARNING = 2

            def __init__(self, severity: int) -> None:
                self.severity = severity

        class Runtime:
            def __init__(self, logger: Logger) -> None:
                assert isinstance(logger, Logger)

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                return Engine(outer, json.loads(plan)) if plan.startswith(b"{") else None

        self.Logger, self.Runtime = Logger, Runtime
        self.ExecutionContextAllocationStrategy = Enum("Memory", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
        self.DynamicShapesKernelSpecializationStrategy = Enum("Kernels", ["LAZY", "EAGER", "NONE"])


class RuntimeConfig:
    """What an execution context of TensorRT-RTX is created with."""

    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._memory = strategy


def widened(path: str) -> bytes:
    """Return a bfloat16 graph in float32: ONNX Runtime has no kernels for it on a CPU."""
    model = ir.external_data.load_to_model(ir.load(path))
    widen(model, "bfloat16")
    return ir.serde.serialize_model(model).SerializeToString()


class Engine:
    """An engine over an ONNX graph; ``profiles`` is a list of input name to [min, opt, max]."""

    def __init__(self, module: FakeTensorRt, plan: dict[str, Any]) -> None:
        self.module, self.plan = module, plan
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")  # a GPU does not saturate
        graph = onnx.load(plan["onnx"], load_external_data=False).graph
        narrow = any(v.type.tensor_type.elem_type == BF16 for v in graph.input)
        runnable = widened(plan["onnx"]) if narrow else plan["onnx"]
        self.session = ort.InferenceSession(runnable, options, providers=["CPUExecutionProvider"])
        self.inputs = {v.name: v for v in graph.input if v.name in {i.name for i in self.session.get_inputs()}}
        self.tensors = {**self.inputs, **{v.name: v for v in graph.output}}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(plan["profiles"])
        self.aliases = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}

    @property
    def device_memory_size_v2(self) -> int:
        return 1 << 16

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [d.dim_value or -1 for d in self.tensors[name].type.tensor_type.shape.dim]

    def get_tensor_dtype(self, name: str) -> Any:
        kind = TYPES[self.tensors[name].type.tensor_type.elem_type][0]
        return Enum("DataType", ["FLOAT", "HALF", "INT64", "INT8", "BF16"])[kind]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.plan["profiles"][profile_index][name]
        return shapes

    def create_execution_context(self, wanted: Any) -> Context:
        memory = wanted._memory if isinstance(wanted, RuntimeConfig) else wanted
        assert memory is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, wanted)


class Context:
    """An execution context; refuses what the real one refuses, fails the test where that would be silent."""

    def __init__(self, engine: Engine, wanted: Any) -> None:
        self.engine, self.wanted, self.profile = engine, wanted, -1
        self.scratch = (0, 0)
        self.met: set[tuple[tuple[int, ...], ...]] = set()
        self.fresh = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.profile >= 0
        assert memory % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.scratch = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.module.records != "no"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.plan["profiles"][self.profile][name]
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name], self.fresh = tuple(shape), True
        return fits

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory, "a null address, which TensorRT refuses even for empty tensors"
        self.addresses[name] = memory
        return name in self.engine.tensors

    def infer_shapes(self) -> list[str]:
        return sorted(set(self.engine.inputs) - set(self.shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, new = self.shapes["input_ids"]
        if name == "logits":
            return (batch, new, self.engine.get_tensor_shape("logits")[2])
        b, heads, past, size = self.shapes[name.replace("present", "past_key_values")]
        return (b, heads, past if name in self.engine.aliases else past + new, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self.engine.module.cuda
        assert stream_handle in cuda.streams
        assert set(self.addresses) == set(self.engine.tensors), "an address is missing"
        assert not self.infer_shapes()
        if cuda.last_error:  # TensorRT checks it after each of its kernels
            return False
        if cuda.recording is not None:
            assert tuple(self.shapes.values()) in self.met, "recorded before it ran with these shapes"
            assert not self.fresh, "shapes were set anew, and no plain step ran since"
            if self.engine.module.records == "fails":
                cuda.invalidated = True
                return False
        self.met.add(tuple(self.shapes.values()))
        self.fresh = False
        shapes, addresses, index = dict(self.shapes), dict(self.addresses), self.profile
        spans = {}
        for name in self.engine.tensors:
            shape = shapes.get(name) or self.get_tensor_shape(name)
            kind = TYPES[self.engine.tensors[name].type.tensor_type.elem_type][1]
            spans[name] = (shape, np.dtype(kind))
        sizes = {name: int(np.prod(shape)) * kind.itemsize for name, (shape, kind) in spans.items()}
        aliases = self.engine.aliases
        assert all(addresses[a] == addresses[b] for a, b in aliases.items()), "a static cache is updated in place"
        outputs = [name for name in self.engine.tensors if name not in self.engine.inputs]
        ranges = sorted((addresses[n], addresses[n] + size, n) for n, size in sizes.items() if n not in aliases)
        for (_, end, one), (start, _, other) in pairwise(ranges):
            assert end <= start or {one, other} <= set(self.engine.inputs), f"{one} and {other} share memory"

        def check() -> None:
            cuda.find(*self.scratch)
            for name, size in sizes.items():
                cuda.find(addresses[name], size)

        def run() -> None:
            feed = {}
            for name in self.engine.inputs:
                shape, kind = spans[name]
                data = cuda.find(addresses[name], int(np.prod(shape)) * kind.itemsize)
                value = np.frombuffer(bytes(data), kind).reshape(shape)
                feed[name] = (value.astype(np.uint32) << 16).view(np.float32) if kind == np.uint16 else value
            if aliases:
                first, new = feed["write_indices"], spans["input_ids"][0][1]
                capacity = spans[next(iter(aliases))][0][2]
                assert ((first >= 0) & (first + new <= capacity)).all(), "written outside of the cache"
            for name, value in zip(outputs, self.engine.session.run(outputs, feed), strict=True):
                assert value.shape == spans[name][0]
                if spans[name][1] == np.uint16:
                    value = torch.from_numpy(value).bfloat16().view(torch.uint16).numpy()
                cuda.find(addresses[name], value.nbytes)[:] = np.ascontiguousarray(value).tobytes()
            self.engine.module.executed.append(index)

        cuda.submit(Work(check, run))
        return True
