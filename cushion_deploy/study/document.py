"""study.json as immutable types (schema 1): the only input of the tables, sentences, figures and page of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from cushion_deploy.report.document.base import (
    Count,
    FreeForm,
    NonNegativeFloat,
    PositiveFloat,
    Seconds,
    StrictModel,
    read_document,
    require_one_string_per_id,
)
from cushion_deploy.report.document.build import Environment, Model, Tool
from cushion_deploy.report.document.measurements import Magnitudes
from cushion_deploy.report.render.formatting import excerpt

STUDY_JSON = "study.json"
PARTS = {
    "table1": "Table 1: perplexity of each scheme",
    "table2": "Table 2: zero-shot accuracy",
    "table3": "Table 3: ablation of the method",
    "remedies": "Ablation of the remedies beyond the paper",
    "table4": "Table 4: six and four bits",
    "table5": "Table 5: input of the last block",
    "table6": "Table 6: search and tuning time",
    "figure2": "Figure 2: activation magnitudes by layer",
    "figure3": "Figure 3: attention by layer",
}
"""Parts of a study in their order, with their titles; numbered as in the paper."""

Share = Annotated[float, Field(ge=0, le=1.001)]


class Score(StrictModel):
    """Perplexity on one text and mean KL divergence from the original model in nats per token; null if not finite.

    ``kl_after_16`` leaves out the predictions that are made at the positions 0 to 15 of a window; null if the windows
    are shorter than 18 tokens. Standard errors treat tokens as independent.
    """

    text: str
    perplexity: PositiveFloat | None
    stderr: NonNegativeFloat | None = None
    divergence: NonNegativeFloat | None
    divergence_stderr: NonNegativeFloat | None = None
    kl_after_16: NonNegativeFloat | None = None
    kl_after_16_stderr: NonNegativeFloat | None = None

    @property
    def distance(self) -> float | None:
        """What says how close a model is to the original: the divergence from position 16 on, where it was measured."""
        return self.divergence if self.kl_after_16 is None else self.kl_after_16


class Text(StrictModel):
    """A text that perplexity is measured on: ``tokens`` are scored in non-overlapping windows of ``window`` tokens.

    ``text_tokens`` is the length of the whole text; null if an earlier version wrote the study.
    """

    name: str
    window: Count
    tokens: Count
    text_tokens: Count | None = None

    @property
    def title(self) -> str:
        """The name, followed by how much of the text was read if that is not all of it."""
        part = excerpt(self.tokens, self.window, self.text_tokens)
        return f"{self.name} ({part})" if part else self.name


class PrefixInUse(StrictModel):
    """The prefix of all columns with a prefix; empty if the search found no sink or the recipe disables the prefix.

    Its first position is that of its first token or, if ``averaged``, the mean of many first tokens.
    """

    token_ids: tuple[Count, ...] = ()
    tokens: tuple[str, ...] = ()
    averaged: bool = False
    tuned: bool = False

    @model_validator(mode="after")
    def _one_string_per_id(self) -> PrefixInUse:
        require_one_string_per_id(self.token_ids, self.tokens)
        return self


class Pair(StrictModel):
    """A scheme (null for floating point) without and with the prefix; ``with_prefix`` is empty without a prefix.

    ``rotated`` is true in rows of the paper's schemes with the recipe's rotations, which the paper does not have.
    ``prefix`` is null for the prefix of the study. A search with the bits of the scheme may find another one;
    ``fp_prefix`` is then the float model with it.
    """

    label: str
    scheme: str | None
    deployable: bool = False
    smoothing_alpha: float | None = None
    rotated: bool = False
    without: tuple[Score, ...]
    with_prefix: tuple[Score, ...] = Field(default=(), validation_alias="with", serialization_alias="with")
    prefix: PrefixInUse | None = None
    fp_prefix: tuple[Score, ...] = ()


class TaskResult(StrictModel):
    """One zero-shot task: the value of its main metric over ``n`` rows."""

    task: str
    metric: str
    n: Count
    value: float
    stderr: NonNegativeFloat | None


class TaskPair(StrictModel):
    """A scheme on every task, without and with the prefix."""

    label: str
    scheme: str | None
    without: tuple[TaskResult, ...]
    with_prefix: tuple[TaskResult, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class Step(StrictModel):
    """One row of an ablation: the recipe settings that produce it, and the float model with the same prefix."""

    label: str
    settings: FreeForm
    prefix: Literal["none", "searched", "tuned"]
    scores: tuple[Score, ...]
    fp: tuple[Score, ...]


class BlockInput(StrictModel):
    """Magnitudes at the input of the last block, averaged over windows: largest, 90th percentile and median."""

    top1: NonNegativeFloat
    top10: NonNegativeFloat
    median: NonNegativeFloat


class LastBlock(StrictModel):
    """Table 5: input of the last block without and with the prefix, over ``windows`` of ``length`` tokens."""

    windows: Count
    length: Count
    without: BlockInput
    with_prefix: BlockInput | None = Field(default=None, validation_alias="with", serialization_alias="with")


class Effort(StrictModel):
    """Table 6: wall time of search and tuning on this machine; null if it was not run."""

    search_seconds: Seconds | None = None
    search_mode: str | None = None
    positions_scored: Count = 0
    positions_full_scan: Count = 0
    candidates_scored: Count = 0
    tuning_seconds: Seconds | None = None
    tuning_steps: Count = 0
    tuning_loss: str | None = None


class LayerAttention(StrictModel):
    """Shares of attention in one layer, averaged over heads and over all text tokens except the first."""

    layer: Count
    prefix: Share
    first: Share
    rest: Share


class Attention(StrictModel):
    """Figure 3: shares of attention per layer, measured on a text of ``tokens`` tokens."""

    tokens: Count
    without: tuple[LayerAttention, ...]
    with_prefix: tuple[LayerAttention, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class Cell(StrictModel):
    """One stored measurement: its wall time when computed, and whether it was computed in an earlier run."""

    name: str
    seconds: Seconds
    reused: bool


class Study(StrictModel):
    """The whole of study.json. A part that was not run is null; if it was requested, ``left_out`` gives the reason."""

    schema_version: Literal[1] = Field(default=1, validation_alias="schema", serialization_alias="schema")
    tool: Tool
    created: AwareDatetime
    model: Model
    recipe: FreeForm
    calibration: str
    prefix: PrefixInUse
    texts: tuple[Text, ...] = ()
    fp: tuple[Score, ...] = ()
    fp_prefix: tuple[Score, ...] = ()
    table1: tuple[Pair, ...] | None = None
    table2: tuple[TaskPair, ...] | None = None
    task_limit: Count | None = None
    table3: tuple[Step, ...] | None = None
    remedies: tuple[Step, ...] | None = None
    table4: tuple[Pair, ...] | None = None
    table5: LastBlock | None = None
    table6: Effort | None = None
    figure2: Magnitudes | None = None
    figure3: Attention | None = None
    left_out: dict[str, str] = Field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    environment: Environment | None = None

    @model_validator(mode="after")
    def _every_text_in_every_row(self) -> Study:
        names = [text.name for text in self.texts]
        rows: list[tuple[str, tuple[Score, ...]]] = []
        for pair in (*(self.table1 or ()), *(self.table4 or ())):
            rows += [(pair.label, pair.without), (pair.label, pair.with_prefix or pair.without)]
        for step in (*(self.table3 or ()), *(self.remedies or ())):
            rows += [(step.label, step.scores), (step.label, step.fp)]
        if rows:
            rows += [("FP", self.fp), ("FP + prefix", self.fp_prefix or self.fp)]
        for label, scores in rows:
            if [score.text for score in scores] != names:
                raise ValueError(f"row '{label}' must have one score for each of the texts {names}")
        unknown = [name for name in self.left_out if name not in PARTS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not a part of a study; parts: {', '.join(PARTS)}")
        return self

    def to_text(self) -> str:
        """Return the text of study.json: indented, keys in the order of the schema, one final newline."""
        return self.model_dump_json(indent=1) + "\n"


def read_study(path: Path) -> Study:
    """Read study.json.

    Raises:
        UntrustedArtifact: the file is missing, is not a study, or has another schema.
    """
    return read_document(path, Study, hint=f"use a {STUDY_JSON} that `cushion-deploy study` wrote")
