"""The original model's opinion of every window, kept small: last hidden states, from which logits follow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.forward import compute_prefix, prefix_tensors, run
from cushion_deploy.modeling.load import LoadedModel

PIECE = 32
"""Tokens whose probabilities are worked on at once: few enough to stay in the processor's cache."""


@dataclass
class Teacher:
    """What the model says without prefix and without quantization; asked before anything is quantized.

    Attributes:
        model: the original model.
        hidden: per window its last hidden states ``[length, hidden]``; logits would take a hundred times the room.
    """

    model: LoadedModel
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.past = prefix_tensors(compute_prefix(self.model, self.model.bare_tokens))
        self.head = self.model.module.get_submodule(self.model.family.head).weight

    @torch.no_grad()
    def remember(self, windows: IntArray, progress: Progress = silent) -> None:
        """Run int64 ``[windows, length]`` through the model, one by one."""
        for done, row in enumerate(windows, 1):
            found = run(self.model, torch.from_numpy(row[None]), self.past, head=False)
            self.hidden[row.tobytes()] = found.last_hidden_state[0]
            progress("asking the original model", done, len(windows))

    @torch.no_grad()
    def log_probabilities(self, ids: IntArray) -> Tensor:
        """Return log probabilities ``[batch, length - 1, vocab]`` of tokens 1.. of remembered windows ``ids``."""
        hidden = torch.stack([self.hidden[row.tobytes()] for row in ids])[:, :-1]
        return self._of_hidden(hidden)

    @torch.inference_mode()
    def compare(
        self,
        model: LoadedModel,
        prefix: Prefix,
        windows: IntArray,
        progress: Progress = silent,
        task: str = "comparing",
    ) -> Fidelity:
        """Score ``model`` behind a prefix on remembered windows int64 ``[count, length]``."""
        past = prefix_tensors(prefix)
        losses, apart = [], []
        for done, row in enumerate(windows, 1):
            logits = run(model, torch.from_numpy(row[None]), past).logits[0, :-1].float()
            hidden, targets = self.hidden[row.tobytes()][:-1], torch.from_numpy(row[1:, None])
            # In pieces, because passes over all logits of a window would take longer than the model.
            for piece in range(0, len(targets), PIECE):
                part = slice(piece, piece + PIECE)
                student = torch.log_softmax(logits[part], -1)
                losses.append(-student.gather(-1, targets[part])[:, 0])
                apart.append(divergence(student, self._of_hidden(hidden[part])))
            progress(task, done, len(windows))
        return Fidelity(torch.cat(losses).numpy(), torch.cat(apart).numpy())

    def _of_hidden(self, hidden: Tensor) -> Tensor:
        logits, cap = nn.functional.linear(hidden, self.head).float(), self.model.spec.logit_cap
        return torch.log_softmax(cap * torch.tanh(logits / cap) if cap else logits, -1)


@dataclass(frozen=True)
class Fidelity:
    """Token losses, and KL divergences from the original model, of a model on text: float32 ``[tokens]``, in nats."""

    losses: FloatArray
    divergences: FloatArray

    @property
    def divergence(self) -> float:
        """Return the mean divergence."""
        return float(self.divergences.mean(dtype=np.float64))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of log probabilities, teacher from student, in nats: ``[..., vocab]`` to ``[...]``."""
    # exp of a log probability below -87 is subnormal: a hundred times slower on most processors, and worth nothing.
    return (teacher.clamp(min=-80).exp() * (teacher - student)).sum(-1)
