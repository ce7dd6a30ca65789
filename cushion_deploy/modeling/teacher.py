"""The predictions of the original model for remembered windows, stored as last hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.runner import TorchRunner

PIECE = 32
"""Tokens whose probabilities are computed at once: few enough to stay in the processor's cache."""


@dataclass
class Teacher:
    """The model without prefix and without quantization; windows are remembered before anything is quantized.

    Attributes:
        model: the original model.
        hidden: the last hidden states ``[length, hidden]`` of each window, by its bytes. Logits follow from them and
            would take a hundred times the memory.
    """

    model: TorchRunner
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.past = self.model.past(self.model.compute_prefix(self.model.bare_tokens))
        self.head = self.model.module.get_submodule(self.model.family.head).weight

    @torch.no_grad()
    def remember(self, windows: IntArray, progress: Progress = silent) -> None:
        """Run windows int64 ``[windows, length]`` through the model, one by one, and store their hidden states."""
        for done, row in enumerate(windows, 1):
            found = self.model.run(self.model.tensor(row[None]), self.past, head=False)
            self.hidden[row.tobytes()] = found.last_hidden_state[0]
            progress("running the original model", done, len(windows))

    @torch.no_grad()
    def log_probabilities(self, ids: IntArray) -> Tensor:
        """Return log probabilities ``[batch, length - 1, vocab]`` of tokens 1.. of remembered windows ``ids``."""
        hidden = torch.stack([self.hidden[row.tobytes()] for row in ids])[:, :-1]
        return self._of_hidden(hidden)

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
        past = model.past(prefix)
        losses, divergences = [], []
        for done, row in enumerate(windows, 1):
            tokens, hidden = model.tensor(row), self.hidden[row.tobytes()][:-1]
            logits, targets = model.run(tokens[None], past).logits[0, :-1].float(), tokens[1:, None]
            # In pieces, because passes over all logits of a window would take longer than the model.
            for piece in range(0, len(targets), PIECE):
                part = slice(piece, piece + PIECE)
                student = torch.log_softmax(logits[part], -1)
                losses.append(-student.gather(-1, targets[part])[:, 0])
                divergences.append(divergence(student, self._of_hidden(hidden[part])))
            progress(task, done, len(windows))
        return Fidelity(model.array(torch.cat(losses)), model.array(torch.cat(divergences)))

    def _of_hidden(self, hidden: Tensor) -> Tensor:
        logits, cap = nn.functional.linear(hidden, self.head).float(), self.model.spec.logit_cap
        return torch.log_softmax(cap * torch.tanh(logits / cap) if cap else logits, -1)


@dataclass(frozen=True)
class Fidelity:
    """Token losses of a model, and its KL divergences from the original model: float32 ``[tokens]`` each, in nats."""

    losses: FloatArray
    divergences: FloatArray

    @property
    def divergence(self) -> float:
        """Return the mean divergence."""
        return float(self.divergences.mean(dtype=np.float64))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats from log probabilities ``[..., vocab]``, as ``[...]``."""
    # exp of a log probability below -87 is subnormal: a hundred times slower on most processors, and worth nothing.
    return (teacher.clamp(min=-80).exp() * (teacher - student)).sum(-1)
