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
from cushion_deploy.stages.windows import calibrated_rows, default_window, longest_prefix

GIB = 1 << 30
LIBRARIES = 620 << 20
"""Memory of a process that has loaded torch, transformers and ONNX Runtime."""
ACTIVATION_COPIES = 6
"""States of a layer that exist at once while it is calibrated."""
LOGIT_TOKENS, LOGIT_COPIES = 128, 4
"""Tokens whose logits are computed at once, and copies of them while they are compared."""

TRAINED_COPIES = 8
"""States of a layer that are kept for its gradient while the prefix is tuned."""
POSITIONS = 1024
"""Positions whose logits are computed at once while the prefix is tuned."""


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
        recipe: the lengths of its texts determine the memory.
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
    free = shutil.disk_usage(_existing(work_dir)).free
    memory = max(compute_memory(speed, recipe), parity_memory(speed, recipe), tuning_memory(speed, recipe))
    # The bundle is assembled next to the work folder, so its files exist twice.
    return Resources(seconds, memory, disk + 2 * spec.parameters, free_memory(), free)


def compute_memory(speed: Speed, recipe: Recipe) -> int:
    """Return the approximate peak while torch calibrates and evaluates, in bytes of the CPU's memory."""
    spec, window = speed.spec, recipe.calibration.window or default_window(speed.spec)
    rows = calibrated_rows(window) * window
    logits = LOGIT_COPIES * 4 * LOGIT_TOKENS * spec.vocab_size
    activations = ACTIVATION_COPIES * 4 * rows * (spec.intermediate_size + spec.hidden_size)
    return LIBRARIES + (speed.weights + logits + activations if speed.on_cpu else 0)


def parity_memory(speed: Speed, recipe: Recipe) -> int:
    """Return the approximate peak of the parity ladder: a cut graph, its results, and the logits of torch."""
    spec, tokens = speed.spec, recipe.parity.tokens
    inputs = 2 * spec.hidden_size + spec.num_heads * spec.head_dim + spec.intermediate_size
    cuts = 2 * 4 * tokens * spec.num_layers * inputs
    logits = (2 + LOGIT_COPIES) * 4 * tokens * spec.vocab_size
    # INT8 weights and, beside them, the same dequantized.
    return LIBRARIES + 5 * spec.parameters + cuts + logits


def tuning_memory(speed: Speed, recipe: Recipe) -> int:
    """Return the approximate peak while the prefix is tuned, in bytes of the CPU's memory; 0 if nothing is tuned."""
    spec, tuning = speed.spec, recipe.tuning
    if not (tuning.enabled and longest_prefix(recipe) and speed.on_cpu):
        return 0
    rows = (tuning.microbatch or 1) * tuning.window
    remembered = (tuning.windows + tuning.held_out) * tuning.window
    # What a layer keeps for its gradient; with checkpointing one layer at a time, and the states between layers.
    layer = TRAINED_COPIES * rows * (spec.intermediate_size + 2 * spec.hidden_size)
    kept = layer + rows * spec.num_layers * spec.hidden_size if tuning.checkpointing else layer * spec.num_layers
    logits = LOGIT_COPIES * 2 * min(rows, POSITIONS) * spec.vocab_size
    return LIBRARIES + speed.weights + 4 * (kept + logits + remembered * spec.hidden_size)


def _existing(path: Path) -> Path:
    """Return the closest existing ancestor of a path."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
