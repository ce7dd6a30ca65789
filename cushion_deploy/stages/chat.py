"""The begin of a chat: prompts from the model's chat template, and the divergence of a model on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.statistics import standard_error
from cushion_deploy.evaluate.chat import ChatPrompts, chat_prompts
from cushion_deploy.runtime.bundle import read_text_files
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import DIVERGENCES, scores_of
from cushion_deploy.store.json_files import finite

if TYPE_CHECKING:
    from cushion_deploy.core.dtypes import IntArray
    from cushion_deploy.modeling.runner import TorchRunner
    from cushion_deploy.modeling.teacher import Fidelity, Teacher


@dataclass(frozen=True)
class ReadChat(Derived[ChatPrompts]):
    """The prompts of a model.

    Attributes:
        files: its tokenizer and chat template.
        text: the text whose passages are the messages.
    """

    files: Node[ModelFiles]
    text: Node[Corpus]

    def make(self, inputs: Inputs) -> ChatPrompts:
        """Render and encode the prompts."""
        return chat_prompts(read_text_files(inputs.get(self.files).folder), inputs.get(self.text).text)


@dataclass(frozen=True)
class ChatWindows:
    """Prompts whose predictions by the original model are remembered.

    Attributes:
        teacher: the original model.
        ids: the prompts as a model with a prefix gets them, int64 ``[prompts, length]``.
        bare: the prompts without a prefix, with the beginning-of-sequence token that the template begins with.
    """

    teacher: Teacher
    ids: IntArray
    bare: IntArray

    @classmethod
    def of(cls, teacher: Teacher, prompts: ChatPrompts, progress: Progress) -> ChatWindows:
        """Run the original model on the prompts, which it gets without a prefix."""
        # A family that needs <bos> has it before every text already.
        begin = () if teacher.model.bare_tokens else prompts.begin
        before = np.tile(np.array(begin, dtype=np.int64), (len(prompts.ids), 1))
        bare = np.concatenate([before, prompts.ids], axis=1)
        teacher.remember(bare, progress)
        for row, whole in zip(prompts.ids, bare, strict=True):
            # Of several processes, each has remembered its share, which is also what it compares.
            if whole.tobytes() in teacher.hidden:
                teacher.hidden[row.tobytes()] = teacher.hidden[whole.tobytes()][len(begin) :]
        return cls(teacher, prompts.ids, bare)

    def compare(self, model: TorchRunner, prefix: Prefix, progress: Progress, task: str) -> Fidelity:
        """Score a model behind a prefix; the first prediction is that of the first token after ``<bos>``."""
        from cushion_deploy.modeling.teacher import Fidelity

        windows = self.ids if prefix.length else self.bare
        found = self.teacher.compare(model, prefix, windows, progress, task)
        begin = windows.shape[1] - self.ids.shape[1]
        return Fidelity(found.losses[:, begin:], found.divergences[:, begin:])


def chat_scores(columns: dict[str, Fidelity]) -> dict[str, Any]:
    """Return ``DIVERGENCES`` of all columns on their prompts, JSON-ready.

    What a template puts before a message is the same in all prompts, so tokens are not independent here: the standard
    error is that of the mean over prompts.
    """
    found: dict[str, Any] = {kind: {} for kind in DIVERGENCES}
    for name, fidelity in columns.items():
        scores = scores_of(fidelity)
        for kind, part in (("divergence", fidelity), ("kl_after_16", fidelity.later)):
            found[kind][name] = scores[kind]
            of_prompts = part.divergences.mean(axis=1) if part.divergences.size else part.divergences
            found[f"{kind}_stderr"][name] = finite(standard_error(of_prompts))
    return found
