"""Where torch runs: the device and the floating-point type that a recipe asks for, and the memory there."""

from __future__ import annotations

import torch

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.host import free_memory
from cushion_deploy.core.processes import SINGLE, Processes
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Compute

GIB = 1 << 30
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
USABLE = 0.8
"""Share of the free memory that weights may fill; the rest is for activations and temporary tensors."""


def resolve_device(name: str, processes: Processes = SINGLE) -> torch.device:
    """Return the device that a recipe names.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` is the accelerator that is there.
        processes: the processes that share the work; each takes a GPU of its own.

    Raises:
        UsageError: this machine does not have the device, or not one for every process.
    """
    kind, _, index = name.partition(":")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(each for each, there in present.items() if there)
    if not present[kind]:
        raise UsageError(f"device '{name}' is not available here", hint=f"choose from: {', '.join(usable())}")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if processes.local_size > 1 and (index or processes.local_size > count):
        wanted = f"all {processes.local_size} processes" if index else f"{processes.local_size} processes"
        raise UsageError(
            f"{wanted} cannot share device '{name}': each needs a GPU of its own, and this machine has {count}",
            hint=f"start with --nproc-per-node {count} and --device cuda, or give --device cpu",
        )
    number = int(index) if index else processes.local_rank
    if number >= count:
        raise UsageError(
            f"device 'cuda:{number}' does not exist: this machine has {count} CUDA devices",
            hint=f"choose from: {', '.join(usable())}",
        )
    return torch.device("cuda", number)


def usable() -> list[str]:
    """Return the devices of this machine by name."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def resolve_dtype(compute: Compute, stored: Dtype) -> Dtype:
    """Return the floating-point type to compute in.

    ``auto`` is float32 on a CPU, where it is as fast as any other type and agrees with the exported graph to the last
    code, and on a GPU the type in which the checkpoint stores the weights.

    Args:
        compute: the recipe's section.
        stored: the type of the checkpoint.
    """
    if compute.dtype != "auto":
        return compute.dtype
    on_gpu = stored != "float32" and resolve_device(compute.device).type != "cpu"
    return stored if on_gpu else "float32"


def weight_memory(compute: Compute, device: torch.device, processes: Processes = SINGLE) -> int:
    """Return the bytes of weights that may stay on a device; processes share the memory of their machine."""
    if compute.memory is not None:
        return int(compute.memory * GIB)
    return int(USABLE * free_bytes(device)) // (1 if device.type == "cuda" else processes.local_size)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device, those included that torch keeps for later tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_memory()


def peak_bytes(device: torch.device) -> int | None:
    """Return the largest memory that torch has allocated on a GPU, in bytes; None for another device."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    """Return the name of a device for reports, such as ``cuda:0 (NVIDIA H100)``; the CPU has its own row there."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
