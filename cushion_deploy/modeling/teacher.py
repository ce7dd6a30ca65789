"""The original model's opinion of every window, kept small: last hidden states, from which logits follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cushion_deploy.modeling.forward import prefix_tensors, run
from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.progress import Progress, silent
from cushion_deploy.types import IntArray, Prefix

FloatArray64 = npt.NDArray[np.float64]


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
        self.head = self.model.module.get_submodule(self.model.family.head).weight

    @torch.no_grad()
    def remember(self, windows: IntArray, progress: Progress = silent) -> None:
        """Run int64 ``[windows, length]`` through the model, one by one."""
        for done, row in enumerate(windows, 1):
            self.hidden[row.tobytes()] = run(self.model, torch.from_numpy(row[None]), [], head=False).last_hidden_state[
                0
            ]
            progress("asking the original model", done, len(windows))

    @torch.no_grad()
    def log_probabilities(self, ids: IntArray) -> Tensor:
        """Return log probabilities ``[batch, length - 1, vocab]`` of tokens 1.. of remembered windows ``ids``."""
        hidden = torch.stack([self.hidden[row.tobytes()] for row in ids])[:, :-1]
        return torch.log_softmax(nn.functional.linear(hidden, self.head).float(), -1)

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
            ids = torch.from_numpy(row[None])
            student = torch.log_softmax(run(model, ids, past).logits[:, :-1].float(), -1)
            losses.append(-student.gather(-1, ids[:, 1:, None])[0, :, 0].double())
            apart.append(divergence(student, self.log_probabilities(row[None]))[0].double())
            progress(task, done, len(windows))
        return Fidelity(torch.cat(losses).numpy(), torch.cat(apart).numpy())


@dataclass(frozen=True)
class Fidelity:
    """How a model does on text: token losses (nats), and divergence from the original model, float64 ``[tokens]``."""

    losses: FloatArray64
    divergences: FloatArray64

    @property
    def perplexity(self) -> float:
        """Return exp of the mean loss."""
        mean = float(self.losses.mean())
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def divergence(self) -> float:
        """Return the mean KL divergence from the original model, nats a token."""
        return float(self.divergences.mean())


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of log probabilities, teacher from student, in nats: ``[..., vocab]`` to ``[...]``."""
    # exp of a log probability below -87 is subnormal: a hundred times slower on most processors, and worth nothing.
    return (teacher.clamp(min=-80).exp() * (teacher - student)).sum(-1)
