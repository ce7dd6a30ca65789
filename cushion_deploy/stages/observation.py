"""What the stages share that observe the model on the calibration text behind a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.search import NoPrefix
from cushion_deploy.stages.windows import calibration_windows, require_positions

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

T = TypeVar("T")


@dataclass(frozen=True)
class Observation(Stage[T]):
    """A stage that observes windows of the calibration text.

    Attributes:
        model: the model.
        prefix: stands before every window.
        text: the calibration text.
        windows: windows that are observed, at most.
        window: tokens in each.
    """

    cost: ClassVar[float] = 1.5
    """Of a pass that is observed, over one that is not."""
    model: Node[TorchRunner]
    prefix: Node[Prefix]
    text: Node[Corpus]
    windows: int
    window: int

    @property
    def label(self) -> str:
        """The name; a build observes behind the prefix and, for comparison, without one."""
        return f"{self.name}-without-prefix" if isinstance(self.prefix, NoPrefix) else self.name

    def observed_windows(self, inputs: Inputs) -> tuple[IntArray, IntArray]:
        """Return ids and mask of the windows, int64 ``[windows, window]``."""
        model = inputs.get(self.model)
        require_positions("calibration.window", self.window, inputs.get(self.prefix).length, model.spec)
        return calibration_windows(model, inputs.get(self.text), self.windows, self.window)

    def seconds(self, speed: Speed) -> float:
        """One pass over the windows."""
        return self.windows * self.window * speed.layers * self.cost
