"""study.json as types: everything a study measured, and the one source of its tables, prose, figures and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.report.document import (
    Count,
    Environment,
    FreeForm,
    Magnitudes,
    Model,
    PositiveFloat,
    Seconds,
    Section,
    Tool,
)

SCHEMA = 1
STUDY_JSON = "study.json"
PARTS = {
    "table1": "Table 1: perplexity of every scheme",
    "table2": "Table 2: zero-shot accuracy",
    "table3": "Table 3: what each part of the method brings",
    "remedies": "Remedies beyond the paper, one by one",
    "table4": "Table 4: six and four bits",
    "table5": "Table 5: the input of the last block",
    "table6": "Table 6: time",
    "figure2": "Figure 2: magnitudes layer by layer",
    "figure3": "Figure 3: where attention goes",
}
"""Parts of a study in their order, with their titles; numbered as in the paper."""

Share = Annotated[float, Field(ge=0, le=1.001)]


class Score(Section):
    """Perplexity on one text and mean KL divergence from the original model, nats a token; null: not finite.

    ``stderr`` is the standard error of the perplexity, tokens taken as independent.
    """

    text: str
    perplexity: PositiveFloat | None
    stderr: Seconds | None = None
    divergence: Seconds | None


class Text(Section):
    """A text that perplexity is measured on: tokens scored, in non-overlapping windows of ``window``."""

    name: str
    window: Count
    tokens: Count


class PrefixInUse(Section):
    """The prefix of every column that has one; empty where the search found no sink or the recipe wants none."""

    token_ids: tuple[Count, ...] = ()
    tokens: tuple[str, ...] = ()
    tuned: bool = False

    @model_validator(mode="after")
    def _one_string_per_id(self) -> PrefixInUse:
        if len(self.token_ids) != len(self.tokens):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.tokens)} token strings")
        return self


class Pair(Section):
    """A scheme (null: floating point), without and with the prefix; ``with_prefix`` is empty where there is none."""

    label: str
    scheme: str | None
    deployable: bool = False
    smoothing_alpha: float | None = None
    without: tuple[Score, ...]
    with_prefix: tuple[Score, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class TaskResult(Section):
    """A zero-shot task: value of its main metric over ``n`` rows."""

    task: str
    metric: str
    n: Count
    value: float
    stderr: Seconds | None


class TaskPair(Section):
    """A scheme in every task, without and with the prefix."""

    label: str
    scheme: str | None
    without: tuple[TaskResult, ...]
    with_prefix: tuple[TaskResult, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class Step(Section):
    """One row of an ablation: the recipe's settings that make it, and the float model with the same prefix."""

    label: str
    settings: FreeForm
    prefix: Literal["none", "searched", "tuned"]
    scores: tuple[Score, ...]
    fp: tuple[Score, ...]


class BlockInput(Section):
    """Magnitudes of the input of the last block: largest, 90th percentile and median, means over windows."""

    top1: Seconds
    top10: Seconds
    median: Seconds


class LastBlock(Section):
    """Table 5: without and with the prefix, over ``windows`` of ``length`` tokens."""

    windows: Count
    length: Count
    without: BlockInput
    with_prefix: BlockInput | None = Field(default=None, validation_alias="with", serialization_alias="with")


class Effort(Section):
    """Table 6: wall time of search and tuning here; null where one was not run."""

    search_seconds: Seconds | None = None
    search_mode: str | None = None
    positions_scored: Count = 0
    positions_full_scan: Count = 0
    candidates_scored: Count = 0
    tuning_seconds: Seconds | None = None
    tuning_steps: Count = 0
    tuning_loss: str | None = None


class LayerAttention(Section):
    """Shares of the attention of one layer, mean over heads and over every text token but the first."""

    layer: Count
    prefix: Share
    first: Share
    rest: Share


class Attention(Section):
    """Figure 3 as numbers, over a text of ``tokens`` tokens."""

    tokens: Count
    without: tuple[LayerAttention, ...]
    with_prefix: tuple[LayerAttention, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class Cell(Section):
    """One measurement that is kept: wall time when it was made, and whether that was in an earlier run."""

    name: str
    seconds: Seconds
    reused: bool


class Study(Section):
    """The whole of study.json. A part that was not run is null, and ``left_out`` says why where it was wanted."""

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
                raise ValueError(f"row '{label}' is not measured on {names}")
        unknown = [name for name in self.left_out if name not in PARTS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no part of a study")
        return self

    def to_text(self) -> str:
        """Return the text of study.json: indented, key order of the schema, one final newline."""
        return self.model_dump_json(indent=1) + "\n"


def read_study(path: Path) -> Study:
    """Read study.json.

    Raises:
        UntrustedArtifact: the file is missing, is no study, or has another schema.
    """
    hint = f"give a {STUDY_JSON} that `cushion-deploy study` wrote"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UntrustedArtifact(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    try:
        return Study.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UntrustedArtifact(f"{path} is no study of schema {SCHEMA}: {where}: {first['msg']}", hint=hint) from error
