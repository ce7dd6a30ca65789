"""The cells of a study as stages: one measurement each, keyed by everything that determines it."""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.perplexity import TextWindows
from cushion_deploy.evaluate.zeroshot import TaskSuite, run_tasks
from cushion_deploy.stages.base import Derived, Node, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.scores import scores_of
from cushion_deploy.stages.windows import Cut, evaluation_windows, require_positions
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner
    from cushion_deploy.modeling.teacher import Teacher

VALUE = "cell.json"
BLOCK_WINDOWS = 10
"""Number of windows that Table 5 is averaged over, as in the paper."""
ATTENTION_TOKENS = 128
"""Length of the text for Figure 3: the weights of all pairs of tokens, heads and layers are in memory at once."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        prefix: the prefix that precedes every text.
        scheme: the quantization scheme; None for floating point.
        smoothing: factors folded into the weights.
        scales: activation scales of a static scheme.
    """

    prefix: Prefix
    scheme: QuantScheme | None = None
    smoothing: Smoothing | None = None
    scales: ActivationScales | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything that determines the results, apart from the model and the text."""
        parts = (self.prefix, self.scheme, self.smoothing, self.scales)
        return digest_json([part.digest if part else "" for part in parts])

    def simulated(self, model: TorchRunner) -> AbstractContextManager[None]:
        """Return a context in which a model with the smoothing folded in runs in this way."""
        from cushion_deploy.modeling.simulate import simulated

        return simulated(model, self.scheme, self.scales) if self.scheme else nullcontext()


@dataclass(frozen=True)
class CellValue:
    """The result of a cell, JSON-ready, and the seconds that it took."""

    value: Any
    seconds: float


@dataclass(frozen=True)
class CellStage(Stage[CellValue]):
    """One measurement.

    Attributes:
        title: the name that is shown to users.
        model: the model in floating point.
    """

    title: str = field(compare=False)
    model: Node[TorchRunner]

    @abstractmethod
    def compute(self, inputs: Inputs) -> Any:
        """Return the value, JSON-ready."""

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the value and the seconds that it took."""
        begin = time.monotonic()
        value = self.compute(inputs)
        write_json(out / VALUE, {"seconds": time.monotonic() - begin, "value": value})

    def read(self, folder: Path) -> CellValue:
        """Return the value and the seconds."""
        found = read_json(folder / VALUE)
        return CellValue(found["value"], found["seconds"])


@dataclass(frozen=True)
class Windows(Derived[TextWindows]):
    """The windows of a text that a study scores.

    Attributes:
        model: the model whose tokenizer is used.
        text: the text.
        cut: how the text is cut.
    """

    model: Node[TorchRunner]
    text: Node[Corpus]
    cut: Cut

    def make(self, inputs: Inputs) -> TextWindows:
        """Cut the text."""
        return evaluation_windows(inputs.get(self.model), inputs.get(self.text), self.cut)


@dataclass(frozen=True)
class TeacherOf(Derived["Teacher"]):
    """The original model's predictions for the windows, computed once for all cells.

    Attributes:
        model: the original model.
        windows: the windows of a text.
    """

    model: Node[TorchRunner]
    windows: Windows

    def make(self, inputs: Inputs) -> Teacher:
        """Run the original model on the windows."""
        from cushion_deploy.modeling.teacher import Teacher

        teacher = Teacher(inputs.get(self.model))
        teacher.remember(inputs.get(self.windows).ids, inputs.progress)
        return teacher


@dataclass(frozen=True)
class TextCell(CellStage):
    """A measurement on a text.

    Attributes:
        text: the text.
        cut: how the text is cut into windows.
        variant: one way to run the model.
        windows: the windows of the text.
    """

    text: Node[Corpus]
    cut: Cut
    variant: Node[Variant]
    windows: Windows = field(compare=False)

    def ids(self, inputs: Inputs) -> IntArray:
        """Return the windows int64 ``[count, window]``; raises UsageError if they do not fit behind the prefix."""
        found = inputs.get(self.windows).ids
        prefix = inputs.get(self.variant).prefix
        require_positions("evaluation.window", found.shape[1], prefix.length, inputs.get(self.model).spec)
        return found


@dataclass(frozen=True)
class Score(TextCell):
    """Perplexity, and divergence from the original model.

    Attributes:
        teacher: the original model's predictions for the windows.
    """

    name: ClassVar[str] = "study-score"
    version: ClassVar[int] = 4
    teacher: Node[Teacher] = field(compare=False)

    def compute(self, inputs: Inputs) -> dict[str, Any]:
        """Return what was scored of how many tokens, and perplexity and divergences with their standard errors."""
        variant, windows = inputs.get(self.variant), self.ids(inputs)
        model, teacher = inputs.get(self.model).folded(variant.smoothing), inputs.get(self.teacher)
        with variant.simulated(model):
            found = teacher.compare(model, variant.prefix, windows, inputs.progress, self.title)
        text_tokens = inputs.get(self.windows).text_tokens
        return {
            "window": windows.shape[1],
            "tokens": int(found.losses.size),
            "text_tokens": text_tokens,
            **scores_of(found),
        }


@dataclass(frozen=True)
class Magnitudes(TextCell):
    """Magnitudes of every layer's output on the first window (Figure 2)."""

    name: ClassVar[str] = "study-magnitudes"
    version: ClassVar[int] = 3

    def compute(self, inputs: Inputs) -> list[dict[str, float]]:
        """Return one row per layer."""
        from cushion_deploy.modeling.magnitudes import layer_magnitudes

        return layer_magnitudes(inputs.get(self.model), inputs.get(self.variant).prefix, self.ids(inputs)[:1])


@dataclass(frozen=True)
class LastBlock(TextCell):
    """Magnitudes at the input of the last block (Table 5), with the number and length of the windows."""

    name: ClassVar[str] = "study-last-block"
    version: ClassVar[int] = 3

    def compute(self, inputs: Inputs) -> dict[str, Any]:
        """Return the magnitudes of the input."""
        from cushion_deploy.study.measure import block_input

        windows = self.ids(inputs)[:BLOCK_WINDOWS]
        found = block_input(inputs.get(self.model), inputs.get(self.variant).prefix, windows, inputs.progress)
        return {"windows": len(windows), "length": windows.shape[1], "input": found}


@dataclass(frozen=True)
class Attention(TextCell):
    """Distribution of attention (Figure 3), and the tokens of the text."""

    name: ClassVar[str] = "study-attention"
    version: ClassVar[int] = 3

    def compute(self, inputs: Inputs) -> dict[str, Any]:
        """Return the shares for every layer."""
        from cushion_deploy.study.measure import attention_shares

        ids = self.ids(inputs)[:1, :ATTENTION_TOKENS]
        shares = attention_shares(inputs.get(self.model), inputs.get(self.variant).prefix, ids)
        return {"tokens": ids.shape[1], "layers": shares}


@dataclass(frozen=True)
class Task(CellStage):
    """A zero-shot task from lm-eval.

    Attributes:
        variant: one way to run the model.
        task: name of an lm-eval task, or of a task file.
        limit: number of rows; None for all.
        lm_eval: version of lm-eval.
        files: digests of the files that a task file may read.
        generation: digest of the model's generation settings: an end-of-sequence token ends generated answers, and is
            the context of a text without one.
        suite: the loaded task.
        batch: contexts that run together.
    """

    name: ClassVar[str] = "study-task"
    version: ClassVar[int] = 3
    variant: Node[Variant]
    task: str
    limit: int | None
    lm_eval: str
    files: tuple[str, ...]
    generation: str
    suite: TaskSuite = field(compare=False)
    batch: int = field(compare=False)

    def compute(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Return one row per subtask."""
        from cushion_deploy.evaluate.lm_harness import ScorerLM
        from cushion_deploy.evaluate.scorer import TORCH_WASTE, Scorer
        from cushion_deploy.modeling.session import TorchSession

        variant = inputs.get(self.variant)
        model = inputs.get(self.model).folded(variant.smoothing)
        # A prefix replaces the beginning-of-sequence token.
        tokenizer, keep_bos = model.tokenizer, variant.prefix.length == 0
        encoding = Encoding.of_tokenizer(
            tokenizer.backend_tokenizer, tokenizer.bos_token_id, model.spec, keep_bos=keep_bos
        )
        with variant.simulated(model):
            scorer = Scorer(TorchSession(model, variant.prefix), waste=TORCH_WASTE)
            # A dynamic scale per tensor covers all tokens that a row runs at once, padding too.
            batch = 1 if variant.scheme and variant.scheme.activations == "dynamic" else self.batch
            results = run_tasks(ScorerLM(scorer, encoding, inputs.progress, self.title, batch), self.suite, self.limit)
        return [{"task": r.task, "metric": r.metric, "n": r.n, "value": r.value, "stderr": r.stderr} for r in results]
