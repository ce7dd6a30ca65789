"""What a build takes on this machine, by the table of its stages: time, memory, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.core.host import free_memory
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Node, Speed, Stage, nodes_behind

GIB = 1 << 30


@dataclass(frozen=True)
class Resources:
    """About how many seconds each stage takes, and how many bytes of memory and disk a build does."""

    seconds: dict[str, float]
    memory: int
    disk: int
    memory_free: int
    disk_free: int

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def estimate(ends: Iterable[Node[Any]], recipe: Recipe, speed: Speed, work_dir: Path) -> Resources:
    """Return what it takes to make some nodes, nothing reused.

    Args:
        ends: the nodes that are wanted, such as the end of a build.
        recipe: its windows bound memory.
        speed: measured on this machine.
        work_dir: on the disk that artifacts go to.
    """
    spec = speed.spec
    seconds: dict[str, float] = {}
    disk = 0
    for node in nodes_behind(*ends):
        if isinstance(node, Stage):
            disk += node.disk(spec)
            if taken := node.seconds(speed):
                # Without a prefix or behind it: one row.
                seconds[node.name] = seconds.get(node.name, 0.0) + taken
    weights = 4 * spec.parameters
    logits = 4 * spec.vocab_size * max(recipe.evaluation.window, recipe.calibration.window)
    memory = int(2.5 * weights) + 6 * logits + GIB
    free = shutil.disk_usage(_existing(work_dir)).free
    # The bundle stands beside the work folder while it is put together.
    return Resources(seconds, memory, disk + 2 * spec.parameters, free_memory(), free)


def _existing(path: Path) -> Path:
    """Return the closest folder above a path that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
