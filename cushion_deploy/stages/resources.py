"""Estimate what a build needs on this machine, stage by stage: time, memory, disk."""

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
    """Estimated seconds of each stage, and bytes of memory and disk for a whole build."""

    seconds: dict[str, float]
    memory: int
    disk: int
    memory_free: int
    disk_free: int

    @property
    def total_seconds(self) -> float:
        """The sum over all stages."""
        return sum(self.seconds.values())


def estimate(ends: Iterable[Node[Any]], recipe: Recipe, speed: Speed, work_dir: Path) -> Resources:
    """Return the resources needed to make some nodes from scratch.

    Args:
        ends: the requested nodes, such as the final node of a build.
        recipe: its window sizes determine the memory.
        speed: the measured speed of this machine.
        work_dir: a path on the disk that holds the artifacts.
    """
    spec = speed.spec
    seconds: dict[str, float] = {}
    disk = 0
    for node in nodes_behind(*ends):
        if isinstance(node, Stage):
            disk += node.disk(spec)
            if taken := node.seconds(speed):
                # Stages with and without the prefix are one row.
                seconds[node.name] = seconds.get(node.name, 0.0) + taken
    weights = 4 * spec.parameters
    logits = 4 * spec.vocab_size * max(recipe.evaluation.window, recipe.calibration.window)
    memory = int(2.5 * weights) + 6 * logits + GIB
    free = shutil.disk_usage(_existing(work_dir)).free
    # The bundle is assembled next to the work folder, so its files exist twice.
    return Resources(seconds, memory, disk + 2 * spec.parameters, free_memory(), free)


def _existing(path: Path) -> Path:
    """Return the closest existing ancestor of a path."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
