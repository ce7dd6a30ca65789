"""Estimate what a build takes on this machine: time by stage, memory, disk."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cushion_deploy.calib.corpora import SAMPLED
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sample import SAMPLE_TOKENS, SAMPLES
from cushion_deploy.pipeline.limits import longest_prefix
from cushion_deploy.pipeline.workspace import Workspace

GIB = 1 << 30


@dataclass(frozen=True)
class Needs:
    """What a build takes on this machine: about how many seconds by stage, and bytes of memory and disk."""

    seconds: dict[str, float]
    memory: int
    disk: int
    memory_free: int
    disk_free: int

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def estimate_needs(ws: Workspace, windows: IntArray) -> Needs:
    """Return what a build takes: token positions of each stage by what one takes here, and sizes by the weights."""
    model, recipe = ws.model, ws.recipe
    spec = model.spec
    layers = _seconds_a_position(model, windows, head=False)
    whole = _seconds_a_position(model, windows, head=True)
    scored = 4 * recipe.evaluation.max_tokens + recipe.evaluation.max_tokens
    calibrated = recipe.calibration.windows * recipe.calibration.window
    seconds: dict[str, float] = {}
    if recipe.calibration.data in SAMPLED:
        # Rows that are decoded together share the reading of the weights, which is most of a step.
        seconds["sample"] = SAMPLES * SAMPLE_TOKENS * 0.6 * whole
    if longest_prefix(recipe):
        search = recipe.search
        candidates = search.random_candidates + search.screen_candidates + search.gradient_candidates
        # Two steps are usual: the second finds nothing. The screen runs the vocabulary through about half the layers.
        per_step = spec.vocab_size / 2 + candidates * 64 + candidates * 20 + 28 * search.text_tokens
        seconds["search"] = 2 * per_step * layers
    columns = 2 if longest_prefix(recipe) else 1
    smoothed = 1 if recipe.smoothing.alpha is not None else 0
    seconds["smooth and calibrate"] = columns * (1 + smoothed) * calibrated * layers * 1.5
    if recipe.tuning.enabled and longest_prefix(recipe):
        trained = recipe.tuning.windows * recipe.tuning.window * recipe.tuning.epochs
        seconds["tune"] = trained * 6 * whole
    seconds["evaluate"] = scored * whole * 1.3
    seconds["parity"] = (recipe.parity.tokens * 12 + recipe.evaluation.max_tokens) * whole
    weights = 4 * spec.parameters
    logits = 4 * spec.vocab_size * max(recipe.evaluation.window, recipe.calibration.window)
    memory = int(2.5 * weights) + 6 * logits + GIB
    # Converted weights, INT8 graph, float twin, half graph and plan; the bundle beside the work folder.
    disk = int(3.5 * weights)
    return Needs(seconds, memory, disk, _free_memory(), shutil.disk_usage(_existing(ws.store.root)).free)


@torch.inference_mode()
def _seconds_a_position(model: TorchRunner, windows: IntArray, *, head: bool) -> float:
    row = model.tensor(windows[:1])
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        model.run(row, [], head=head)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / row.shape[1]


def _free_memory() -> int:
    """Return the bytes of memory that are free for use; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


def _existing(path: Path) -> Path:
    """Return the closest folder above a path that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
