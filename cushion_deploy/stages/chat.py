"""Chats: prompts from the model's chat template, the original model's answers, and the divergence on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.statistics import standard_error
from cushion_deploy.evaluate.chat import ANSWER_TOKENS, ChatPrompts, chat_prompts
from cushion_deploy.runtime.bundle import read_text_files
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import scores_of
from cushion_deploy.store.json_files import finite

if TYPE_CHECKING:
    from cushion_deploy.core.dtypes import IntArray
    from cushion_deploy.modeling.runner import TorchRunner
    from cushion_deploy.modeling.teacher import Fidelity, Teacher

CHAT_DIVERGENCES = ("answer", "answer_stderr", "prompt", "prompt_stderr")
"""The scores of chats."""


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
        return chat_prompts(read_text_files(inputs.get(self.files).folder), inputs.get(self.text).prose)


@dataclass(frozen=True)
class ChatFidelity:
    """Scores of a model on chats.

    Attributes:
        prompt: predictions within the prompt, which nobody reads: the first is that of the second token after
            ``<bos>``.
        answer: predictions of the answer's tokens.
    """

    prompt: Fidelity
    answer: Fidelity


@dataclass(frozen=True)
class ChatWindows:
    """Prompts and the original model's answers to them, whose predictions by that model are remembered.

    Attributes:
        teacher: the original model.
        ids: prompts and answers as a model with a prefix gets them, int64 ``[prompts, length]``.
        bare: the same without a prefix, with the beginning-of-sequence token that the template begins with.
        answer: number of the answer's tokens.
    """

    teacher: Teacher
    ids: IntArray
    bare: IntArray
    answer: int

    @classmethod
    def of(cls, teacher: Teacher, prompts: ChatPrompts, progress: Progress) -> ChatWindows | None:
        """Let the original model answer the prompts, without a prefix; None if there are none, or no positions."""
        from cushion_deploy.modeling.sample import answer_greedily

        model, length = teacher.model, prompts.ids.shape[1]
        # An eighth of the positions is left to a prefix.
        count = min(ANSWER_TOKENS, model.spec.max_positions - model.spec.max_positions // 8 - length)
        if prompts.missing or count < 1:
            return None
        # A family that needs <bos> has it before every text already.
        begin = () if model.bare_tokens else prompts.begin
        before = np.tile(np.array(begin, dtype=np.int64), (len(prompts.ids), 1))
        asked = np.concatenate([before, prompts.ids], axis=1)
        bare = np.concatenate([asked, answer_greedily(model, asked, count, prompts.ends)], axis=1)
        ids = np.ascontiguousarray(bare[:, len(begin) :])
        teacher.remember(bare, progress)
        for row, whole in zip(ids, bare, strict=True):
            # Of several processes, each has remembered its share, which is also what it compares.
            if whole.tobytes() in teacher.hidden:
                teacher.hidden[row.tobytes()] = teacher.hidden[whole.tobytes()][len(begin) :]
        return cls(teacher, ids, bare, count)

    def compare(self, model: TorchRunner, prefix: Prefix, progress: Progress, task: str) -> ChatFidelity:
        """Score a model behind a prefix."""
        windows = self.ids if prefix.length else self.bare
        found = self.teacher.compare(model, prefix, windows, progress, task)
        begin = windows.shape[1] - self.ids.shape[1]
        return ChatFidelity(found.part(slice(begin, -self.answer)), found.part(slice(-self.answer, None)))


def chat_scores(columns: dict[str, ChatFidelity]) -> dict[str, Any]:
    """Return ``CHAT_DIVERGENCES`` of all columns, JSON-ready.

    What a template puts around a message is the same in all prompts, and the tokens of an answer depend on each other:
    the standard error is that of the mean over prompts.
    """
    found: dict[str, Any] = {kind: {} for kind in CHAT_DIVERGENCES}
    for name, fidelity in columns.items():
        for kind, part in (("answer", fidelity.answer), ("prompt", fidelity.prompt)):
            found[kind][name] = scores_of(part)["divergence"]
            found[f"{kind}_stderr"][name] = finite(standard_error(part.divergences.mean(axis=1)))
    return found
