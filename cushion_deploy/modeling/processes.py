"""Collective operations of the processes that share the work of a stage."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, distributed

from cushion_deploy.core.processes import Processes
from cushion_deploy.modeling.devices import resolve_device

Reduction = Literal["sum", "max", "min"]


def join(processes: Processes, device: str) -> None:
    """Connect this process to the others: over nccl if each has a GPU, over gloo elsewhere."""
    if processes.size > 1 and not distributed.is_initialized():
        on_gpu = resolve_device(device, processes.local_rank).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(processes.local_rank)
        distributed.init_process_group("nccl" if on_gpu else "gloo")


def leave() -> None:
    """Disconnect this process from the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def reduce(tensor: Tensor, reduction: Reduction, processes: Processes) -> Tensor:
    """Return the elementwise sum, maximum or minimum of a tensor over all processes; it is changed in place."""
    if processes.size > 1:
        operations = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX, "min": distributed.ReduceOp.MIN}
        distributed.all_reduce(tensor, operations[reduction])
    return tensor


def leader_says(value: bool, processes: Processes) -> bool:
    """Return the value that process 0 gives; every process waits here for all others."""
    if processes.size == 1:
        return value
    on_gpu = distributed.get_backend() == "nccl"
    told = torch.full((1,), int(value and processes.leads), device="cuda" if on_gpu else "cpu")
    return bool(reduce(told, "sum", processes))
