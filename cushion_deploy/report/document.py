"""report.json as types: what a build measured, in schema 1; the one source of page, figures and terminal summary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from cushion_deploy.errors import UntrustedArtifact

SCHEMA = 1
REPORT_JSON = "report.json"

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# "screen" is what reports said for "self-sink" while it was the only screen.
CandidateSource = Literal["self-sink", "gradient", "obvious", "random", "seed", "scan", "screen"]


def _refuse_unknown_sources(value: str) -> str:
    known = get_args(CandidateSource)
    for source in value.split(" + "):
        if source not in known:
            raise ValueError(f"unknown source of a candidate: {source!r}; known: {', '.join(known)}")
    return value


CandidateSources = Annotated[str, AfterValidator(_refuse_unknown_sources)]
"""All sources that named a token, such as ``self-sink + gradient``."""


def _refuse_non_finite(value: JsonValue) -> JsonValue:
    """Refuse NaN and infinity inside a free-form value; pydantic accepts them there when it reads JSON text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number; write null")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _refuse_non_finite(child)
    return value


FreeForm = dict[str, Annotated[JsonValue, AfterValidator(_refuse_non_finite)]]
"""A JSON object whose keys are another module's business."""


class Section(BaseModel):
    """A part of report.json: unknown keys, NaN and infinity are refused; instances cannot be changed."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


class Tool(Section):
    """The program that wrote the report."""

    version: str


class Model(Section):
    """The model that was built; ``parameters`` counts scalars."""

    family: str
    parameters: Count
    source: str
    layers: Count
    hidden_size: Count
    heads: Count
    kv_heads: Count
    vocab_size: Count
    weights_digest: str


class Divergence(Section):
    """Mean KL divergence from the original model in nats a token, per column; ``null`` where it was not finite."""

    fp: Seconds | None
    fp_prefix: Seconds | None
    quantized: Seconds | None
    quantized_prefix: Seconds | None


class Perplexity(Section):
    """Perplexity on text not used for calibration; ``null`` where it was not measured or not finite.

    Attributes:
        window: tokens of one non-overlapping window.
        tokens: tokens scored in all.
        fp, fp_prefix, quantized, quantized_prefix: the four columns; quantization simulated.
        engine: the compiled engine, prefix included.
        divergence: how far each column is from the original model, on the same text.
    """

    corpus: str
    window: Count
    tokens: Count
    fp: PositiveFloat | None
    fp_prefix: PositiveFloat | None
    quantized: PositiveFloat | None
    quantized_prefix: PositiveFloat | None
    engine: PositiveFloat | None = None
    divergence: Divergence | None = None


class Candidate(Section):
    """A token that was scored exactly at one step of the search."""

    token_id: Count
    token: str
    source: CandidateSources
    objective: float


class SearchStep(Section):
    """One step of the greedy search: the best token, and whether its gain was worth a prefix position.

    Attributes:
        proposed, finalists: how many tokens each source named, and how many of them were scored exactly; a token
            that several named counts for each. Empty in reports that did not record it.
    """

    token_id: Count
    token: str
    source: CandidateSources
    objective_before: float
    objective_after: float
    ratio: float
    accepted: bool
    top: tuple[Candidate, ...] = ()
    proposed: dict[CandidateSource, Count] = {}
    finalists: dict[CandidateSource, Count] = {}


class Rank(Section):
    """Rank 1 is the best; ``of`` is the size of the random sample of the vocabulary."""

    rank: Annotated[int, Field(ge=1)]
    of: Count


class Search(Section):
    """The prefix search; an empty ``token_ids`` means that no sink was worth a prefix."""

    mode: str
    objective: str
    seed_tokens: tuple[int | str, ...] = ()
    token_ids: tuple[Count, ...]
    tokens: tuple[str, ...]
    positions_scored: Count
    positions_full_scan: Count
    candidates_scored: Count
    rank_in_random_sample: tuple[Rank, ...] = ()
    seconds: Seconds
    stopped: str
    steps: tuple[SearchStep, ...] = ()

    @model_validator(mode="after")
    def _one_string_per_id(self) -> Search:
        if len(self.token_ids) != len(self.tokens):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.tokens)} token strings")
        return self


class TuningState(Section):
    """The quantized model after some steps of tuning: its loss on held-out text, and both loss parts of the step."""

    step: Count
    held_out: float | None
    prediction: float | None = None
    error: float | None = None


class Tuning(Section):
    """The tuning of the prefix; the state with the lowest held-out loss was kept, step 0 being the untuned prefix.

    ``skipped`` counts steps that changed nothing because a gradient was not finite.
    """

    loss: str
    scales_tuned: bool
    steps: Count
    seconds: Seconds
    kept_step: Count
    skipped: Count = 0
    states: tuple[TuningState, ...]


class LayerMagnitude(Section):
    """The three largest and the median activation magnitude of one layer's output."""

    layer: Count
    top1: Seconds
    top2: Seconds
    top3: Seconds
    median: Seconds


class Magnitudes(Section):
    """Activation magnitudes per layer, without and with the prefix."""

    without: tuple[LayerMagnitude, ...]
    with_prefix: tuple[LayerMagnitude, ...] = Field(validation_alias="with", serialization_alias="with")


class SiteScale(Section):
    """The static scale of one Site and the largest magnitude seen there."""

    site: str
    scale: PositiveFloat
    amax: Annotated[float, Field(ge=0)]


class Calibration(Section):
    """How the activation scales were found, and what they are; the alpha of SmoothQuant, null where it was not used."""

    estimator: str
    corpus: str
    tokens: Count
    sites: tuple[SiteScale, ...]
    smoothing_alpha: float | None = None


class KvCache(Section):
    """An INT8 key/value cache; the last column of the perplexity table is measured with it.

    Attributes:
        scales: per-head or per-tensor.
        with_prefix: whether the prefix lies in the cache and is quantized too.
        bytes_a_token, float32_bytes_a_token: size of keys and values of all layers.
        float_perplexity, float_divergence: the same quantized model with a floating-point cache, same text.
    """

    scales: Literal["per-head", "per-tensor"]
    with_prefix: bool
    bytes_a_token: Count
    float32_bytes_a_token: Count
    float_perplexity: PositiveFloat | None
    float_divergence: Seconds | None = None


class Export(Section):
    """The exported graph; ``float_bytes`` is the size of its floating-point twin.

    ``float_sites`` and their ``float_linears`` stay in floating point because the recipe says so.
    """

    opset: Count
    linears: Count
    packed_linears: Count
    quantize_head: bool
    bytes: Count
    float_bytes: Count
    rules_checked: tuple[str, ...] = ()
    float_sites: tuple[str, ...] = ()
    float_linears: Count = 0


class ParityRow(Section):
    """One check of the parity ladder; a ``value`` of null was not finite."""

    rung: str
    metric: str
    value: float | None
    limit: float
    direction: Literal["at most", "at least"]
    passed: bool
    site: str | None = None
    note: str = ""

    @model_validator(mode="after")
    def _verdict_follows_from_numbers(self) -> ParityRow:
        if self.value is None:
            # Only +infinity 'at least' a limit can be null and still hold.
            contradiction = self.passed and self.direction == "at most"
        else:
            holds = self.value <= self.limit if self.direction == "at most" else self.value >= self.limit
            contradiction = self.passed != holds
        if contradiction:
            raise ValueError(
                f"{self.rung}, {self.metric}: passed={self.passed} contradicts "
                f"{self.value} {self.direction} {self.limit}"
            )
        return self


class Engine(Section):
    """A compiled engine: linears found in INT8, and whether it was executed on the building machine."""

    engine: str
    targets: tuple[str, ...]
    linears: Count
    int8_linears: Count
    fused_attention: Count
    ran: bool
    note: str = ""
    details: FreeForm = Field(default_factory=dict)


class Stage(Section):
    """Wall time of one stage of the build; ``reused`` when an earlier result served."""

    stage: str
    seconds: Seconds
    reused: bool


class Environment(Section):
    """The machine and the library versions of the build."""

    python: str
    platform: str
    cpu: str
    versions: dict[str, str] = Field(default_factory=dict)
    peak_rss_bytes: Count | None = None


class Report(Section):
    """The whole of report.json. A section that was not run is null, a list that was not run is empty."""

    schema_version: Literal[1] = Field(default=1, validation_alias="schema", serialization_alias="schema")
    tool: Tool
    created: AwareDatetime
    model: Model
    recipe: FreeForm = Field(default_factory=dict)
    precision: str
    perplexity: Perplexity | None = None
    search: Search | None = None
    tuning: Tuning | None = None
    magnitudes: Magnitudes | None = None
    calibration: Calibration | None = None
    kv_cache: KvCache | None = None
    export: Export | None = None
    parity: tuple[ParityRow, ...] = ()
    engines: tuple[Engine, ...] = ()
    stages: tuple[Stage, ...] = ()
    environment: Environment | None = None

    def to_text(self) -> str:
        """Return the text of report.json: indented, key order of the schema, one final newline."""
        return self.model_dump_json(indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        UntrustedArtifact: the file is missing, is no report, or has another schema.
    """
    hint = "run `cushion-deploy verify` on the bundle, or build it again"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UntrustedArtifact(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UntrustedArtifact(
            f"{path} is no report of schema {SCHEMA}: {where}: {first['msg']}"
            f" ({error.error_count()} such finding(s) in all)",
            hint=hint,
        ) from error
