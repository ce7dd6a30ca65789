"""Choose: ship the prefix only if the quantized model is closer to the original with it than without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.statistics import standard_error
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import scores_of
from cushion_deploy.stages.windows import held_out_windows
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.teacher import Fidelity

T = TypeVar("T")
CHOICE = "choice.json"
HELD_OUT = 8
"""Windows of the calibration text, at most, that candidates are judged on and no scale is calibrated on."""


@dataclass(frozen=True)
class Candidate:
    """The scores of one candidate on held-out text; see :func:`~cushion_deploy.stages.scores.scores_of`."""

    name: str
    perplexity: float | None
    divergence: float | None
    kl_after_16: float | None
    kl_after_16_stderr: float | None


@dataclass(frozen=True)
class Choice:
    """Which candidate is shipped.

    Attributes:
        shipped: name of that candidate.
        reason: the measure that decided: ``kl_after_16`` or, where that differs by less than its standard error,
            ``perplexity``; ``only`` if there was nothing to choose.
        tokens: number of predictions that were compared.
        candidates: the scores of all candidates.
    """

    shipped: str
    reason: str
    tokens: int = 0
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """Rebuild from ``asdict``."""
        return cls(**{**data, "candidates": tuple(Candidate(**each) for each in data["candidates"])})


@dataclass(frozen=True)
class Choose(Stage[Choice]):
    """Compare quantizations, each as it would ship: with smoothing and scales of its own.

    They are judged on text that was not calibrated on (tuning may have read it), by the divergence of the quantized
    model from the original one from position 16 on; the first token of a text, which is the sink of the original model,
    decides nothing. Where two differ by less than the standard error of the difference, the perplexity decides.

    Attributes:
        names: name of each candidate; the first is the one to beat.
        candidates: the quantizations.
        text: the calibration text.
        windows, window: how the calibration cuts it.
    """

    name: ClassVar[str] = "choose"
    version: ClassVar[int] = 2
    shared: ClassVar[bool] = True
    model: Node[Any]
    names: tuple[str, ...]
    candidates: tuple[Node[Quantization], ...]
    text: Node[Corpus]
    windows: int
    window: int | None

    def shortcut(self, inputs: Inputs) -> Choice | None:
        """Return the last candidate if all have the same prefix: the search found none."""
        prefixes = {inputs.get(node).prefix.digest for node in self.candidates}
        return Choice(self.names[-1], "only") if len(prefixes) == 1 else None

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the choice."""
        from cushion_deploy.modeling.simulate import simulated
        from cushion_deploy.modeling.teacher import Teacher

        model = inputs.get(self.model)
        windows = held_out_windows(model, inputs.get(self.text), self.windows, self.window, HELD_OUT)
        teacher = Teacher(model)
        teacher.remember(windows, inputs.progress)
        found: dict[str, Fidelity] = {}
        for name, node in zip(self.names, self.candidates, strict=True):
            quantization = inputs.get(node)
            folded = model.folded(quantization.smoothing)
            with simulated(folded, quantization.scheme, quantization.scales, kv=quantization.kv_scales):
                task = f"choosing: {name}"
                found[name] = teacher.compare(folded, quantization.prefix, windows, inputs.progress, task)
        write_json(out / CHOICE, asdict(choose(found)))

    def read(self, folder: Path) -> Choice:
        """Return the choice."""
        return Choice.from_json(read_json(folder / CHOICE))

    def seconds(self, speed: Speed) -> float:
        """Count a pass of the original model, and a quantized one for each candidate."""
        tokens = HELD_OUT * (self.window or 512)
        return tokens * speed.layers + len(self.names) * (tokens * speed.quantized + speed.swap)


def choose(found: Mapping[str, Fidelity]) -> Choice:
    """Return the choice among candidates that were scored on the same windows; the first one wins a tie."""
    names = list(found)
    best, reason = names[0], "kl_after_16"
    for name in names[1:]:
        better, by = _better(found[name], found[best])
        # With more than two, the reason is that of the last comparison that the winner won.
        if better or len(names) == 2:
            reason = by
        best = name if better else best
    scores = {name: scores_of(each) for name, each in found.items()}
    kept = ("perplexity", "divergence", "kl_after_16", "kl_after_16_stderr")
    rows = tuple(Candidate(name, **{key: scores[name][key] for key in kept}) for name in names)
    return Choice(best, reason, int(found[best].later.divergences.size), rows)


def _better(one: Fidelity, other: Fidelity) -> tuple[bool, str]:
    """Return whether ``one`` is better than ``other``, and the measure that decided."""
    for name, of_one, of_other in (
        ("kl_after_16", one.later.divergences, other.later.divergences),
        ("perplexity", one.losses, other.losses),
    ):
        difference: FloatArray = of_one - of_other
        if difference.size and np.isfinite(difference).all():
            mean = float(difference.mean(dtype=np.float64))
            spread = standard_error(difference)
            if name == "perplexity" or abs(mean) > (0.0 if math.isnan(spread) else spread):
                return mean < 0, name
    # What is not finite is never better than what is.
    return bool(np.isfinite(one.losses).all()) and not np.isfinite(other.losses).all(), "perplexity"


@dataclass(frozen=True)
class Chosen(Derived[T]):
    """What belongs to the candidate that was chosen.

    Attributes:
        choice: the choice.
        names: name of each candidate.
        options: what belongs to each.
    """

    choice: Node[Choice]
    names: tuple[str, ...]
    options: tuple[Node[T], ...]

    def make(self, inputs: Inputs) -> T:
        """Return the one that belongs to the chosen candidate."""
        return inputs.get(self.options[self.names.index(inputs.get(self.choice).shipped)])
