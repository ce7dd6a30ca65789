"""Tune: train keys and values of the prefix, with some losses also the scales, on calibration text (Eq. 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.artifacts import SCALES_FILE, read_prefix, read_scales, write_prefix, write_scales
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.errors import UsageError
from cushion_deploy.prefix.trace import TuningTrace
from cushion_deploy.recipe import Tuning as TuningSettings
from cushion_deploy.stages.base import Node, Part, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import require_positions, spread_windows
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

TRACE = "trace.json"
STEP_COST = 3.5
"""Cost of a token in a training step (gradient and recomputed layers included), relative to a compared position: 3.3 on
SmolLM2 with one thread, through the quantized model too."""


@dataclass(frozen=True)
class TunedPrefix:
    """Prefix and scales after tuning, and the trace of the training; ``trace`` is None if there was nothing to tune.

    The scales are those that the prefix was tuned with. They fit the smoothing of the start, and ship with it only if
    the model was quantized while the prefix was tuned.
    """

    prefix: Prefix
    scales: ActivationScales
    trace: TuningTrace | None


@dataclass(frozen=True)
class Tune(Stage[TunedPrefix]):
    """Train the prefix and keep the best state on held-out text, the untuned one included.

    Attributes:
        model: the model in floating point.
        quantization: the starting point.
        text: the calibration text.
        tuning: the recipe's section of that name.
        seed: seed of the order of the windows.
    """

    name: ClassVar[str] = "tune"
    version: ClassVar[int] = 4
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    text: Node[Corpus]
    tuning: TuningSettings
    seed: int

    @property
    def tuned_prefix(self) -> Node[Prefix]:
        """The tuned prefix."""
        return Part(self, "prefix")

    @property
    def tuned_scales(self) -> Node[ActivationScales]:
        """The tuned scales."""
        return Part(self, "scales")

    def shortcut(self, inputs: Inputs) -> TunedPrefix | None:
        """Return the untuned prefix and scales if the search found no prefix."""
        found = inputs.get(self.quantization)
        return None if found.prefix.length else TunedPrefix(found.prefix, found.static_scales, None)

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the prefix, the scales and the trace."""
        from cushion_deploy.prefix.tune import PrefixTuning

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        require_positions("tuning.window", self.tuning.window, quantization.prefix.length, model.spec)
        windows = self._windows(model, inputs.get(self.text))
        checkpoints = inputs.scratch, inputs.progress
        tuning = PrefixTuning(model, quantization, *windows, self.tuning, self.seed, *checkpoints)
        tuned, scales, trace = tuning.run()
        write_prefix(tuned, out / PREFIX_FILE)
        write_scales(scales, out / SCALES_FILE)
        write_json(out / TRACE, trace.to_json())

    def _windows(self, model: TorchRunner, text: Corpus) -> tuple[IntArray, IntArray]:
        """Return the windows to train on and the held-out ones; both are spread over the text."""
        config = self.tuning
        windows = spread_windows(model, text, config.windows + config.held_out, config.window)
        judged = np.zeros(len(windows), dtype=bool)
        judged[np.linspace(0, len(windows) - 1, min(config.held_out, len(windows) // 2)).astype(int)] = True
        if judged.sum() == 0:
            raise UsageError(
                f"the calibration text has one window of {config.window} tokens, and tuning needs at least two",
                hint="give more text, or a smaller window (tuning.window)",
            )
        return windows[~judged], windows[judged]

    def read(self, folder: Path) -> TunedPrefix:
        """Return the prefix, the scales and the trace."""
        prefix, scales = read_prefix(folder / PREFIX_FILE), read_scales(folder / SCALES_FILE)
        return TunedPrefix(prefix, scales, TuningTrace.from_json(read_json(folder / TRACE)))

    def seconds(self, speed: Speed) -> float:
        """Count every window once before tuning and once per epoch, and held-out windows once per evaluation."""
        config = self.tuning
        steps = math.ceil(config.windows / config.batch) * config.epochs
        judged = config.windows + config.held_out * (2 + math.ceil(steps / config.judge_every))
        trained = config.windows * config.epochs * (STEP_COST if config.checkpointing else STEP_COST - 1)
        remembered = (config.windows + config.held_out) * config.window * speed.layers
        return (trained + judged) * config.window * speed.compared + remembered
