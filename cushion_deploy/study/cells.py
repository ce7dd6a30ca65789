"""The measurements of a study and the stages that make them; an interrupted study continues at the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import PAPER_ALPHA, PRECISIONS, QuantScheme, parse_scheme
from cushion_deploy.prefix.trace import SearchTrace, TuningTrace
from cushion_deploy.recipe import ROTATIONS
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.calibrate import Calibrate
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.windows import Cut
from cushion_deploy.study.document import Cell
from cushion_deploy.study.document import Score as ScoreRow
from cushion_deploy.study.stages import Attention, CellStage, LastBlock, Magnitudes, Score, TeacherOf, Variant, Windows

UNROTATED: dict[str, Any] = {f"smoothing.{name}": 0 for name in ROTATIONS}
"""Settings of rows in which no input is rotated: those of the paper, and remedies before the rotation."""
EXTENT = ("window", "tokens", "text_tokens")
"""What a score says about its text."""


@dataclass(frozen=True)
class Built:
    """The quantization that a recipe produces with a prefix, and the trace of the tuning; None without tuning."""

    quantization: Quantization
    tuning: TuningTrace | None

    @property
    def variant(self) -> Variant:
        """The corresponding way to run the model."""
        q = self.quantization
        return Variant(q.prefix, q.scheme, q.smoothing, q.scales)


@dataclass
class Cells:
    """The measurements of one study.

    Attributes:
        pipeline: its recipe determines what is deployed, and how texts are cut into windows.
        run: the work folder.
        texts: texts as given with ``--eval-data``; the first one is also used for Table 5 and both figures.
        done: the cells that were requested, in order of first use.
    """

    pipeline: Pipeline
    run: Run
    texts: Sequence[str | None]
    done: dict[CellStage, Cell] = field(default_factory=dict)

    @cached_property
    def searched(self) -> Prefix:
        """The prefix that the search found, its first position averaged where that is better; may be empty."""
        return self.run.get(self.pipeline.prefix)

    @cached_property
    def trace(self) -> SearchTrace | None:
        """The trace of the search; None if the recipe disables the prefix."""
        search = self.pipeline.search
        return self.run.get(search).trace if search else None

    @cached_property
    def found(self) -> Prefix:
        """The prefix of the tokens that the search found, no position averaged."""
        if self.trace is None or not self.trace.averaged:
            return self.searched
        return self.run.get(self.pipeline.model).compute_prefix(self.trace.token_ids)

    @cached_property
    def empty(self) -> Prefix:
        """The empty prefix, or ``<bos>`` alone for families that need it."""
        return self.run.get(self.pipeline.no_prefix)

    @cached_property
    def prefix(self) -> Prefix:
        """The prefix of every column 'with the prefix', tuned if the recipe enables tuning."""
        if self.pipeline.recipe.tuning.enabled and self.searched.length:
            return self.built(self.searched).quantization.prefix
        return self.searched

    def of_bits(self, scheme: QuantScheme) -> Cells:
        """Return the cells whose prefix is searched with the bits of a scheme's activations."""
        recipe, bits = self.pipeline.recipe, scheme.activation_bits
        if bits == PRECISIONS[recipe.precision].activation_bits or recipe.search.objective == "max":
            return self
        return replace(self, pipeline=self.pipeline.altered({"search.bits": bits}))

    def built(self, prefix: Prefix, settings: dict[str, Any] | None = None) -> Built:
        """Return what the recipe, with some settings replaced, would deploy with a prefix."""
        branch = self.pipeline.altered(settings or {}).behind(Given(prefix))
        trace = self.run.get(branch.tuning).trace if branch.tuning and prefix.length else None
        return Built(self.run.get(branch.quantization), trace)

    def in_scheme(self, name: str, prefix: Prefix, *, rotated: bool = False) -> Variant:
        """Return the variant for a named scheme of the paper, with the paper's alpha and min-max ranges.

        Args:
            name: the scheme.
            prefix: the prefix.
            rotated: whether inputs are rotated as the recipe says, which the paper's are not.
        """
        pipeline, given = self.pipeline, Given(prefix)
        scheme = parse_scheme(name, quantize_head=pipeline.recipe.export.quantize_head)
        paper = pipeline.altered(
            {**({} if rotated else UNROTATED), "smoothing.alpha": PAPER_ALPHA, "smoothing.limit": None}
        )
        smoothing = paper.smoothing(given) if scheme.smoothing else None
        scales = None
        if scheme.activations == "static":
            config = pipeline.recipe.calibration
            observed = pipeline.model, given, pipeline.text, config.windows, config.window
            codes = scheme.activation_bits, scheme.symmetric
            scales = self.run.get(Calibrate(*observed, smoothing, "max", 100.0, *codes)).scales
        return Variant(prefix, scheme, self.run.get(smoothing) if smoothing else None, scales)

    def scores(self, label: str, variant: Variant) -> tuple[ScoreRow, ...]:
        """Return perplexity and divergence on every text, one cell per text."""
        return tuple(self._score(label, variant, text) for text in self.texts)

    def described(self, text: str | None) -> dict[str, Any]:
        """Return how much of a text is scored, and in which windows, from the cell of the float model."""
        found = self._scored("FP", Variant(self.empty), text)
        return {"name": self._name(text), **{name: found[name] for name in EXTENT}}

    def _score(self, label: str, variant: Variant, text: str | None) -> ScoreRow:
        found = self._scored(label, variant, text)
        return ScoreRow(text=self._name(text), **{name: value for name, value in found.items() if name not in EXTENT})

    def _scored(self, label: str, variant: Variant, text: str | None) -> dict[str, Any]:
        windows, common = self._text(text)
        teacher = TeacherOf(self.pipeline.model, windows)
        title = f"{label}, {self._name(text)}"
        found: dict[str, Any] = self.value(Score(title, self.pipeline.model, *common, Given(variant), windows, teacher))
        return found

    def magnitudes(self, prefix: Prefix) -> list[dict[str, float]]:
        """Return the magnitudes of every layer's output on the first window (Figure 2)."""
        found: list[dict[str, float]] = self.value(Magnitudes(*self._behind("magnitudes", prefix)))
        return found

    def last_block(self, prefix: Prefix) -> dict[str, Any]:
        """Return the magnitudes at the input of the last block (Table 5), with the number and length of the windows."""
        found: dict[str, Any] = self.value(LastBlock(*self._behind("input of the last block", prefix)))
        return found

    def attention(self, prefix: Prefix) -> dict[str, Any]:
        """Return the distribution of attention (Figure 3), and the tokens of the text."""
        found: dict[str, Any] = self.value(Attention(*self._behind("attention", prefix)))
        return found

    def value(self, stage: CellStage) -> Any:
        """Return the JSON value of a cell, computed now or in an earlier run."""
        first = stage not in self.done
        found = self.run.get(stage)
        if first:
            # The last timed stage is this one; the stages and loads that it depends on come before it.
            reused = self.run.times[-1].reused
            self.done[stage] = Cell(name=stage.title, seconds=found.seconds, reused=reused)
        return found.value

    def _name(self, text: str | None) -> str:
        return self.run.get(self.pipeline.corpus(text, "evaluation")).name

    def _text(self, text: str | None) -> tuple[Windows, tuple[Any, Cut]]:
        """Return the windows of a text, and the fields that determine them."""
        common = self.pipeline.corpus(text, "evaluation"), Cut.of(self.pipeline.recipe, text)
        return Windows(self.pipeline.model, *common), common

    def _behind(self, what: str, prefix: Prefix) -> tuple[Any, ...]:
        """Return the fields of a cell on the first text with a prefix."""
        windows, common = self._text(self.texts[0])
        title = f"{what}, {'with' if prefix.length else 'without'} the prefix"
        return title, self.pipeline.model, *common, Given(Variant(prefix)), windows
