"""Choose: ship the prefix only if the quantized model is closer to the original with it than without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.statistics import mean, standard_error
from cushion_deploy.evaluate.chat import ANSWER_TOKENS, ChatPrompts
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.chat import ChatWindows
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import scores_of
from cushion_deploy.stages.windows import held_out_windows
from cushion_deploy.store.json_files import finite, read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.teacher import Fidelity

T = TypeVar("T")
CHOICE = "choice.json"
HELD_OUT = 8
"""Windows of the calibration text, at most, that candidates are judged on and no scale is calibrated on."""


@dataclass(frozen=True)
class Candidate:
    """The scores of one candidate on held-out text; see :func:`~cushion_deploy.stages.scores.scores_of`.

    Attributes:
        answer, answer_stderr: divergence on the original model's answers in chats; None if there are no chats.
    """

    name: str
    perplexity: float | None
    divergence: float | None
    kl_after_16: float | None
    kl_after_16_stderr: float | None
    answer: float | None = None
    answer_stderr: float | None = None


@dataclass(frozen=True)
class Choice:
    """Which candidate is shipped.

    Attributes:
        shipped: name of that candidate.
        reason: the measure that decided: ``divergence`` or, where that differs by less than its standard error,
            ``perplexity``; ``only`` if there was nothing to choose.
        tokens: number of predictions of the text that were compared.
        answer_tokens: number of predictions of answers in chats that were compared as well.
        candidates: the scores of all candidates.
    """

    shipped: str
    reason: str
    tokens: int = 0
    answer_tokens: int = 0
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """Rebuild from ``asdict``."""
        return cls(**{**data, "candidates": tuple(Candidate(**each) for each in data["candidates"])})


@dataclass(frozen=True)
class Choose(Stage[Choice]):
    """Compare quantizations, each as it would ship: with smoothing and scales of its own.

    They are judged by the divergence of the quantized model from the original one on text that was not calibrated on
    (tuning may have read it), from position 16 on, and on the original model's answers in chats; both count the same.
    The first token of a text, which is the sink of the original model, decides nothing, and neither does what the model
    predicts within a prompt. Where two differ by less than the standard error of the difference, the perplexity of the
    text decides.

    Attributes:
        names: name of each candidate; the first is the one to beat.
        candidates: the quantizations.
        text: the calibration text.
        windows, window: how the calibration cuts it.
        chat: prompts of chats.
    """

    name: ClassVar[str] = "choose"
    version: ClassVar[int] = 4
    shared: ClassVar[bool] = True
    model: Node[Any]
    names: tuple[str, ...]
    candidates: tuple[Node[Quantization], ...]
    text: Node[Corpus]
    windows: int
    window: int | None
    chat: Node[ChatPrompts]

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
        chat = ChatWindows.of(teacher, inputs.get(self.chat), inputs.progress)
        found: dict[str, Judged] = {}
        for name, node in zip(self.names, self.candidates, strict=True):
            quantization = inputs.get(node)
            folded = model.folded(quantization.smoothing)
            with simulated(folded, quantization.scheme, quantization.scales, kv=quantization.kv_scales):
                task = f"choosing: {name}"
                text = teacher.compare(folded, quantization.prefix, windows, inputs.progress, task)
                chats = chat.compare(folded, quantization.prefix, inputs.progress, f"{task}, chats") if chat else None
                found[name] = Judged(text, chats.answer if chats else None)
        write_json(out / CHOICE, asdict(choose(found)))

    def read(self, folder: Path) -> Choice:
        """Return the choice."""
        return Choice.from_json(read_json(folder / CHOICE))

    def seconds(self, speed: Speed) -> float:
        """Count a pass and the answers of the original model, and a quantized pass for each candidate."""
        tokens = HELD_OUT * (self.window or 512)
        original = tokens * speed.layers + ANSWER_TOKENS * speed.decode_step
        return original + len(self.names) * (tokens * speed.quantized + speed.swap)


@dataclass(frozen=True)
class Judged:
    """Scores of a candidate on text, and on the answers in chats; None if there are no chats."""

    text: Fidelity
    answers: Fidelity | None = None

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores of a :class:`Candidate`."""
        kept = ("perplexity", "divergence", "kl_after_16", "kl_after_16_stderr")
        found = {key: value for key, value in scores_of(self.text).items() if key in kept}
        if self.answers is not None:
            found["answer"] = scores_of(self.answers)["divergence"]
            found["answer_stderr"] = finite(standard_error(self.answers.divergences.mean(axis=1)))
        return found


def choose(found: Mapping[str, Judged]) -> Choice:
    """Return the choice among candidates that were scored on the same windows; the first one wins a tie."""
    names = list(found)
    best, reason = names[0], "divergence"
    for name in names[1:]:
        better, by = _better(found[name], found[best])
        # With more than two, the reason is that of the last comparison that the winner won.
        if better or len(names) == 2:
            reason = by
        best = name if better else best
    rows = tuple(Candidate(name, **each.scores) for name, each in found.items())
    answers = found[best].answers
    return Choice(
        best,
        reason,
        tokens=int(found[best].text.later.divergences.size),
        answer_tokens=int(answers.divergences.size) if answers else 0,
        candidates=rows,
    )


def _better(one: Judged, other: Judged) -> tuple[bool, str]:
    """Return whether ``one`` is better than ``other``, and the measure that decided."""
    difference, spread = _difference(one, other)
    if math.isfinite(difference) and abs(difference) > spread:
        return difference < 0, "divergence"
    losses = one.text.losses - other.text.losses
    if losses.size and np.isfinite(losses).all():
        return mean(losses) < 0, "perplexity"
    # What is not finite is never better than what is.
    return bool(np.isfinite(one.text.losses).all()) and not np.isfinite(other.text.losses).all(), "perplexity"


def _difference(one: Judged, other: Judged) -> tuple[float, float]:
    """Return how much further from the original ``one`` is, in nats a token, and the standard error of that.

    Both are those of the mean over the kinds of text: text from position 16 on, and answers. They are NaN of nothing
    and of what is not finite.
    """
    differences = [one.text.later.divergences - other.text.later.divergences]
    if one.answers is not None and other.answers is not None:
        # The tokens of an answer depend on each other.
        differences.append((one.answers.divergences - other.answers.divergences).mean(axis=1))
    differences = [each for each in differences if each.size]
    if not differences:
        return math.nan, math.nan
    errors = [standard_error(each) for each in differences]
    spread = math.hypot(*(0.0 if math.isnan(error) else error for error in errors))
    return sum(map(mean, differences)) / len(differences), spread / len(differences)


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
