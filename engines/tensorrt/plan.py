"""A deserialized plan: checked against the contract of its graph; its profiles and execution contexts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.session import INPUTS, past_names
from cushion_deploy.engines.tensorrt.cuda import Cuda, DeviceBuffer
from cushion_deploy.engines.tensorrt.profiles import CACHE, WRITE_INDICES, Profile, read_profiles
from cushion_deploy.errors import CheckFailed, MissingDependency, UntrustedArtifact

REBUILD = "compile the engine again here: `cushion-deploy build ... --engine {engine}`"
_TYPES: dict[str, Dtype] = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16"}


class Plan:
    """A plan of TensorRT or TensorRT-RTX.

    Attributes:
        contract: contract of the bundle's graph, with the type, cache capacity and positions of the plan.
        profiles: optimization profiles, fewest new tokens first.

    Args:
        plan: bytes of a plan that is trusted: deserializing runs machine code.
        contract: contract of the graph in the bundle.
        module: ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        MissingDependency: the library is not installed.
        CheckFailed: the library refuses the plan.
        UntrustedArtifact: the plan was compiled from a graph with another contract.
    """

    def __init__(self, plan: bytes, contract: GraphContract, module: str) -> None:
        """Deserialize and check."""
        self._trt = import_library(module)
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise CheckFailed(
                f"{module} {self._trt.__version__} refuses the plan: compiled by another version or for another GPU",
                hint=REBUILD.format(engine=module.replace("_", "-")),
            )
        dtype, capacity = _check_contract(self._engine, contract)
        self.profiles = read_profiles(self._engine)
        # A plan may admit fewer tokens than the model has positions: then its own limit is the one reported.
        room = max(profile.past[1] for profile in self.profiles) + 1 - contract.prefix_slots
        positions = min(contract.max_positions, room + contract.prefix_length)
        self.contract = replace(contract, dtype=dtype, max_positions=positions, cache_capacity=capacity)
        self._configs: list[Any] = []

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a call needs besides inputs and outputs, in the most demanding profile."""
        return int(self._engine.device_memory_size_v2)

    def context(self, profile: Profile, cuda: Cuda, scratch: DeviceBuffer) -> Any:
        """Create an execution context for a profile that works in ``scratch``.

        Contexts that never run at the same time may share the scratch memory; otherwise each would reserve as much as
        the most demanding profile needs.

        Raises:
            CheckFailed: the library cannot create the context.
        """
        context = self._engine.create_execution_context(self._context_config(profile))
        if context is None or not context.set_optimization_profile_async(profile.index, cuda.stream):
            raise CheckFailed(
                f"no execution context for the profile '{profile.name}'",
                hint="free device memory, or compile the engine with a smaller --max-context",
            )
        cuda.synchronize()
        context.set_device_memory(scratch.at(self.scratch_bytes), self.scratch_bytes)
        return context

    def _context_config(self, profile: Profile) -> Any:
        """Return what to create a context with: caller-managed memory, and the kernel specialization of TensorRT-RTX.

        Decoding with a static cache has one shape per batch size. Its specialized kernels are compiled in the first
        step (EAGER), so that the CUDA graph captures those and not the slower generic ones used meanwhile.
        """
        memory = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None or not self.contract.cache_capacity or profile.sequence > 1:
            return memory
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(memory)
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._configs.append(config)
        return config

    def inspect(self) -> str:
        """Return the JSON of the engine inspector."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Release the engine; its contexts must have been released before."""
        self._configs.clear()
        self._engine = self._runtime = None


def import_library(module: str) -> Any:
    """Import a library; raises MissingDependency, with the install command, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingDependency(
            f"{module} is not installed",
            hint=f"pip install 'cushion-deploy[{'rtx' if module == 'tensorrt_rtx' else 'tensorrt'}]'",
        ) from e


def _check_contract(engine: Any, contract: GraphContract) -> tuple[Dtype, int]:
    """Return floating-point type and cache capacity of a plan; raises UntrustedArtifact if its graph is another one.

    With an INT8 cache the plan does not show the floating-point type: that of the contract is returned.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    past = past_names(contract)
    present = [name.replace("past_key_values", "present") for name in past]
    static = WRITE_INDICES in names
    expected = {*INPUTS, *past, *present, "logits", *([WRITE_INDICES] if static else [])}
    found = tuple(engine.get_tensor_shape(CACHE)) if CACHE in names else ()
    wanted = (contract.num_kv_heads, contract.head_dim)
    # With a static cache the prefix can only be in the cache.
    wrong = set(names) != expected or (found[1], found[3]) != wanted or static != (found[2] > 0)
    if wrong or (static and contract.prefix_length != contract.prefix_slots):
        differing = sorted(set(names) ^ expected)
        raise UntrustedArtifact(
            f"the plan is not of this bundle's graph: {differing[0] if differing else CACHE} does not match",
            hint="build the bundle again",
        )
    for source, target in zip(past, present, strict=True):
        if static and engine.get_aliased_input_tensor(target) != source:
            raise UntrustedArtifact(f"the plan does not update {source} in place", hint="build the bundle again")
    kind = engine.get_tensor_dtype(CACHE).name
    if (kind not in _TYPES and kind != "INT8") or contract.quantized_cache != (kind == "INT8"):
        raise UntrustedArtifact(f"the plan keeps its cache as {kind}", hint="build the bundle again")
    return _TYPES.get(kind, contract.dtype), found[2] if static else 0
