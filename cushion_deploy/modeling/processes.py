"""Collective operations of the processes that share the work of a stage."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor, distributed

from cushion_deploy.core.processes import Processes
from cushion_deploy.modeling.devices import resolve_device

Reduction = Literal["sum", "max", "min"]
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one may sample text or run tasks alone for hours."""


def join(processes: Processes, device: str) -> None:
    """Connect this process to the others: over nccl if each has a GPU, over gloo elsewhere."""
    if processes.size > 1 and not distributed.is_initialized():
        place = resolve_device(device, processes)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)


def leave() -> None:
    """Disconnect this process from the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def reduce(tensor: Tensor, reduction: Reduction, processes: Processes) -> Tensor:
    """Return the elementwise sum, maximum or minimum of a tensor over all processes; it is changed in place."""
    if processes.size > 1:
        operations = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX, "min": distributed.ReduceOp.MIN}
        # nccl reduces tensors on a GPU, gloo those of the CPU.
        moved = tensor.to("cuda" if distributed.get_backend() == "nccl" else "cpu").contiguous()
        distributed.all_reduce(moved, operations[reduction])
        if moved is not tensor:
            tensor.copy_(moved)
    return tensor


def leader_says(value: bool, processes: Processes) -> bool:
    """Return the value that process 0 gives; every process waits here for all others."""
    return bool(reduce(torch.full((1,), int(value and processes.leads)), "sum", processes))
