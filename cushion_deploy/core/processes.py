"""The processes that share the work of a stage, started by torchrun; a single one without torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cushion_deploy.errors import UsageError


@dataclass(frozen=True)
class Processes:
    """This process and the others that do the same work on other batches.

    Every process runs the same code. Batch ``i`` is run by process ``i`` modulo the number of processes, whole and as a
    single process would run it, and the results are combined by operations whose result does not depend on the order:
    maxima, integer sums, and sums in which all terms but one are zero. So the result is that of one process.

    Attributes:
        rank: number of this process, from 0; process 0 writes files and prints.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on its machine, which share its memory.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of_torchrun(cls) -> Processes:
        """Return this process among those that torchrun started, or a single one."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Return the numbers of the batches, of ``count``, that this process runs."""
        return range(self.rank, count, self.size)


SINGLE = Processes()
"""A process that works alone."""


def require_one_process(command: str) -> None:
    """Raise UsageError if torchrun started several processes of a command that cannot share its work."""
    if Processes.of_torchrun().size > 1:
        raise UsageError(
            f"'{command}' runs in one process",
            hint="start it without torchrun; search, calibrate and eval share their work over several processes",
        )
