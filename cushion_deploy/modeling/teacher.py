"""The predictions of the original model for remembered windows, stored as last hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.statistics import mean, standard_error
from cushion_deploy.modeling.runner import TorchRunner

PIECE = 32
"""Tokens whose probabilities are computed at once: few enough to stay in the processor's cache."""
BEGIN = 16
"""Positions at the begin of a text that are also reported without: the original model has its attention sink there."""
ALL_BUT_LAST = slice(None, -1)


@dataclass
class Teacher:
    """A model without quantization; windows are remembered before anything is quantized.

    Attributes:
        model: the original model.
        prefix: what precedes every window; None for what precedes a text if there is no prefix.
        hidden: the last hidden states ``[length, hidden]`` of each window, by its bytes. Logits follow from them and
            would take a hundred times the memory.
    """

    model: TorchRunner
    prefix: Prefix | None = None
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.past = self.model.past(self.prefix or self.model.no_prefix())
        self.head = self.model.module.get_submodule(self.model.family.head).weight

    def remember(self, windows: IntArray, progress: Progress = silent) -> None:
        """Run windows int64 ``[windows, length]`` through the model, one by one, and store their hidden states."""
        batches = self.model.batches(windows, None, 1)

        def store(number: int, hidden: Tensor) -> None:
            # Cloned outside of inference mode: tuning takes gradients of what is computed from them.
            with torch.inference_mode(False):
                self.hidden[windows[number].tobytes()] = hidden[0].clone()

        self.model.sweep(batches, self.past, after=store, progress=progress, task="running the original model")

    @torch.inference_mode()
    def losses(self, windows: IntArray) -> FloatArray:
        """Return the losses float32 ``[count, length - 1]`` of the original model on remembered windows."""
        found = self.model.zeros(len(windows), windows.shape[1] - 1, dtype=torch.float32)
        for number, tokens in enumerate(self.model.tensor(windows)):
            # Another process remembers the others.
            hidden = self.hidden.get(windows[number].tobytes(), found[:0])[:-1]
            for start in range(0, len(hidden), PIECE):
                part = slice(start, start + PIECE)
                targets = tokens[1:][part, None]
                found[number, part] = -self._of_hidden(hidden[part]).gather(-1, targets)[:, 0]
        return self.model.array(self.model.reduce(found, "sum"))

    @torch.no_grad()
    def log_probabilities(self, ids: IntArray, part: slice = ALL_BUT_LAST) -> Tensor:
        """Return log probabilities ``[batch, positions, vocab]`` of what follows positions of remembered windows.

        Args:
            ids: the windows.
            part: the positions; by default all that a token follows, which gives those of tokens 1..
        """
        return self._of_hidden(torch.stack([self.hidden[row.tobytes()][part] for row in ids]))

    @torch.inference_mode()
    def compare(
        self,
        model: TorchRunner,
        prefix: Prefix,
        windows: IntArray,
        progress: Progress = silent,
        task: str = "comparing",
    ) -> Fidelity:
        """Score ``model`` behind a prefix on remembered windows int64 ``[count, length]``."""
        length = windows.shape[1] - 1
        found, tokens = model.zeros(2, len(windows), length, dtype=torch.float32), model.tensor(windows)

        def score(number: int, states: Tensor) -> None:
            teacher = self.hidden[windows[number].tobytes()]
            for piece, logits in model.predictions(states[0]):
                # In small parts, because passes over all logits of a piece would take longer than the model.
                for start in range(piece.start, piece.stop, PIECE):
                    part = slice(start, min(start + PIECE, piece.stop))
                    student = torch.log_softmax(logits[start - piece.start : part.stop - piece.start], -1)
                    targets = tokens[number, 1:][part]
                    found[0, number, part] = -student.gather(-1, targets[:, None])[:, 0]
                    found[1, number, part] = divergence(student, self._of_hidden(teacher[part]))

        batches = model.batches(windows, None, 1)
        model.sweep(batches, model.past(prefix), after=score, progress=progress, task=task)
        losses, divergences = model.array(model.reduce(found, "sum"))
        return Fidelity(losses, divergences)

    def _of_hidden(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(self.model.scaled_logits(nn.functional.linear(hidden, self.head)), -1)


@dataclass(frozen=True)
class Fidelity:
    """Token losses of a model, and its KL divergences from the original model: float32, in nats.

    Both are ``[windows, length - 1]``. Column p belongs to the prediction that is made at position p of the window, of
    the token at p + 1; tokens of a prefix have no position.
    """

    losses: FloatArray
    divergences: FloatArray

    def part(self, positions: slice) -> Fidelity:
        """Return the predictions that are made at some positions of every window."""
        return Fidelity(self.losses[:, positions], self.divergences[:, positions])

    @property
    def later(self) -> Fidelity:
        """The predictions that are made from position 16 on; none if the windows are shorter than 18 tokens."""
        return self.part(slice(BEGIN, None))

    @property
    def divergence(self) -> float:
        """The mean divergence; NaN of no prediction."""
        return mean(self.divergences)

    @property
    def divergence_stderr(self) -> float:
        """The standard error of the mean divergence, treating tokens as independent."""
        return standard_error(self.divergences)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats from log probabilities ``[..., vocab]``, as ``[...]``."""
    # exp of a log probability below -87 is subnormal: a hundred times slower on most processors, and worth nothing.
    return (teacher.clamp(min=-80).exp() * (teacher - student)).sum(-1)
