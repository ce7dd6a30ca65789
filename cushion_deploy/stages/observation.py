"""Base of the stages that observe the model on the calibration text behind a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.search import NoPrefix
from cushion_deploy.stages.windows import WINDOW, calibration_windows, require_positions

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

T = TypeVar("T")


@dataclass(frozen=True)
class Observation(Stage[T]):
    """A stage that observes windows of the calibration text.

    Attributes:
        model: the model.
        prefix: the prefix that precedes every window.
        text: the calibration text.
        windows: maximum number of windows.
        window: tokens in each window; None for the default of the model.
    """

    model: Node[TorchRunner]
    prefix: Node[Prefix]
    text: Node[Corpus]
    windows: int
    window: int | None

    @property
    def label(self) -> str:
        """The name; says whether the stage observes with the prefix or, for comparison, without one."""
        return f"{self.name}-without-prefix" if isinstance(self.prefix, NoPrefix) else self.name

    def label_of(self, inputs: Inputs) -> str:
        """Return the label; a search that found nothing leaves nothing to observe behind."""
        return self.label if inputs.get(self.prefix).length else f"{self.name}-without-prefix"

    def observed_windows(self, inputs: Inputs) -> tuple[IntArray, IntArray]:
        """Return the ids and the mask of the windows, int64 ``[windows, window]``."""
        model = inputs.get(self.model)
        ids, mask = calibration_windows(model, inputs.get(self.text), self.windows, self.window)
        require_positions("calibration.window", ids.shape[1], inputs.get(self.prefix).length, model.spec)
        return ids, mask

    def seconds(self, speed: Speed) -> float:
        """One pass over the windows; none without the prefix if the search probably finds none."""
        repeated = isinstance(self.prefix, NoPrefix) and not self.prefix.bare and not speed.search_steps
        return 0.0 if repeated else self.windows * (self.window or WINDOW) * speed.observed
