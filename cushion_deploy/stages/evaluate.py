"""Evaluate: perplexity and divergence in four columns, the latter also for chats; magnitudes of activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.evaluate.chat import ANSWER_TOKENS, MESSAGE_TOKENS, PROMPTS, ChatPrompts
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.chat import ChatFidelity, ChatWindows, chat_scores
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import DIVERGENCES, scores_of
from cushion_deploy.stages.windows import Cut, evaluation_windows
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.core.dtypes import IntArray
    from cushion_deploy.modeling.runner import TorchRunner
    from cushion_deploy.modeling.teacher import Fidelity, Teacher

RESULT = "evaluation.json"


@dataclass(frozen=True)
class Evaluate(Stage[dict[str, Any]]):
    """Score the model in floating point and quantized, each with and without the prefix.

    The column 'quantized' uses the same recipe without a prefix: its own smoothing and scales, no tuning.

    Attributes:
        model: the model in floating point.
        quantization: the quantization with the prefix.
        bare: the quantization without a prefix.
        no_prefix: what precedes a text if there is no prefix.
        text: the evaluation text.
        cut: how the text is cut into windows.
        chat: prompts of chats.
    """

    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 5
    shared: ClassVar[bool] = True
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    bare: Node[Quantization]
    no_prefix: Node[Prefix]
    text: Node[Corpus]
    cut: Cut
    chat: Node[ChatPrompts]

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the columns and the magnitudes."""
        from cushion_deploy.modeling.magnitudes import layer_magnitudes
        from cushion_deploy.modeling.teacher import Teacher

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        prefix, corpus = quantization.prefix, inputs.get(self.text)
        text = evaluation_windows(model, corpus, self.cut, prefix.length)
        windows = text.ids
        teacher = Teacher(model)
        teacher.remember(windows, inputs.progress)
        prompts = inputs.get(self.chat)
        chat = ChatWindows.of(teacher, prompts, inputs.progress)
        measure = _Columns(model, teacher, windows, chat, inputs)
        four = measure.four(quantization, inputs.get(self.bare))
        columns = {name: scores_of(found.text) for name, found in four.items()}
        chats = {name: found.chat for name, found in four.items() if found.chat}
        found: dict[str, Any] = {
            "perplexity": {
                "corpus": corpus.name,
                "window": windows.shape[1],
                "tokens": int(windows.shape[0] * (windows.shape[1] - 1)),
                "text_tokens": text.text_tokens,
                **{name: scores["perplexity"] for name, scores in columns.items()},
                **{kind: {name: s[kind] for name, s in columns.items()} for kind in ("stderr", *DIVERGENCES)},
            },
            "chat": {
                "prompts": len(prompts.ids),
                "tokens": prompts.ids.shape[1],
                "answer_tokens": chat.answer if chat else 0,
                "missing": prompts.missing or ("" if chat else "the model has too few positions for an answer"),
                **(chat_scores(chats) if chats else {}),
            },
            "magnitudes": {
                "without": layer_magnitudes(model, inputs.get(self.no_prefix), windows[:1]),
                "with": layer_magnitudes(model, prefix, windows[:1]),
            },
        }
        if quantization.kv_scales:
            plain = measure.quantized(replace(quantization, kv_scales=None), "W8A8, float cache")
            found["float_cache"] = scores_of(plain.text)
        write_json(out / RESULT, found)

    def read(self, folder: Path) -> dict[str, Any]:
        """Return ``perplexity``, ``chat``, ``magnitudes`` and, for an INT8 cache, ``float_cache``; see report.json."""
        found: dict[str, Any] = read_json(folder / RESULT)
        return found

    def seconds(self, speed: Speed) -> float:
        """Sum the pass of the original model, and a column in floating point and a quantized one for each prefix."""
        prefixes = 1 + min(speed.search_steps, 1)
        tokens = self.cut.tokens + PROMPTS * (2 * MESSAGE_TOKENS + ANSWER_TOKENS)
        columns = prefixes * (tokens * (speed.compared + speed.quantized) + speed.swap)
        return tokens * speed.layers + columns + ANSWER_TOKENS * speed.decode_step


@dataclass(frozen=True)
class _Found:
    """Scores on the text and on chats; None if there are none."""

    text: Fidelity
    chat: ChatFidelity | None


@dataclass(frozen=True)
class _Columns:
    """Scores several ways to run the model on the same windows against the original model's predictions."""

    model: TorchRunner
    teacher: Teacher
    windows: IntArray
    chat: ChatWindows | None
    inputs: Inputs

    def four(self, quantization: Quantization, bare: Quantization) -> dict[str, _Found]:
        """Return the four columns; those with and without the prefix are the same if it precedes every text anyway."""
        found = {"fp": self.floating(bare.prefix, "FP")}
        another = quantization.prefix.digest != bare.prefix.digest
        found["fp_prefix"] = self.floating(quantization.prefix, "FP + prefix") if another else found["fp"]
        found["quantized"] = self.quantized(bare, "W8A8")
        same = not another and quantization.digest == bare.digest
        found["quantized_prefix"] = found["quantized"] if same else self.quantized(quantization, "W8A8 + prefix")
        return found

    def floating(self, prefix: Prefix, name: str) -> _Found:
        """Score the float model behind a prefix."""
        return self._compare(self.model, prefix, name)

    def quantized(self, quantization: Quantization, name: str) -> _Found:
        """Score the quantized model behind its prefix."""
        from cushion_deploy.modeling.simulate import simulated

        model = self.model.folded(quantization.smoothing)
        with simulated(model, quantization.scheme, quantization.scales, kv=quantization.kv_scales):
            return self._compare(model, quantization.prefix, name)

    def _compare(self, model: TorchRunner, prefix: Prefix, name: str) -> _Found:
        progress = self.inputs.progress
        text = self.teacher.compare(model, prefix, self.windows, progress, f"perplexity: {name}")
        chat = self.chat.compare(model, prefix, progress, f"chats: {name}") if self.chat else None
        return _Found(text, chat)
