"""The built model, the graph and engines made from it with their parity checks, and the machine and time it took."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from cushion_deploy.report.document.base import Count, FreeForm, NonNegativeFloat, PositiveFloat, Seconds, StrictModel


class Tool(StrictModel):
    """The program that wrote the document."""

    version: str


class Model(StrictModel):
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


class Stage(StrictModel):
    """Wall time of one stage of the build; ``reused`` if the result of an earlier build was used.

    ``ran_on`` is the device, the floating-point type and, if there were several, the processes that computed the
    result; empty if no model ran.
    """

    stage: str
    seconds: Seconds
    reused: bool
    ran_on: str = ""


class Environment(StrictModel):
    """The machine and the library versions of the build."""

    python: str
    platform: str
    cpu: str
    versions: dict[str, str] = Field(default_factory=dict)
    peak_rss_bytes: Count | None = None
    peak_device_bytes: Count | None = None


class Export(StrictModel):
    """The exported graph; ``float_bytes`` is the size of the same graph in floating point.

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


class ParityRow(StrictModel):
    """One check of the parity ladder; ``value`` is null if it was not finite."""

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


class Engine(StrictModel):
    """A compiled engine: its number of INT8 linears, and whether it was run on the machine that built it.

    ``perplexity`` and ``stderr`` are those of the parity ladder; the default engine has them in ``report.perplexity``.
    """

    engine: str
    targets: tuple[str, ...]
    linears: Count
    int8_linears: Count
    fused_attention: Count
    ran: bool
    perplexity: PositiveFloat | None = None
    stderr: NonNegativeFloat | None = None
    note: str = ""
    details: FreeForm = Field(default_factory=dict)


class LargestValue(StrictModel):
    """The largest magnitude in one part of the float16 graph on the calibration text.

    Attributes:
        part: scope in the graph, such as ``layers.3.mlp``.
        tensor: operator that computes it, such as ``residual``.
        value: the magnitude; null if it is not finite.
        token, token_id: the token at which it occurs.
        position: its position in a window; -1 in the prefix.
    """

    part: str
    tensor: str
    value: NonNegativeFloat | None
    token: str
    token_id: Count
    position: int


class PlanType(StrictModel):
    """The floating-point type of plans.

    Attributes:
        dtype: the type.
        wanted: the setting of the recipe.
        margin: factor by which the largest value must be in the range of float16 for an automatic choice of it.
        corpus, tokens: text that was measured, and its number of tokens.
        values: the largest value in each part of the graph, in order of computation; empty if the type does not depend
            on them.
    """

    dtype: Literal["float32", "float16", "bfloat16"]
    wanted: Literal["auto", "float32", "float16", "bfloat16"]
    margin: PositiveFloat
    corpus: str = ""
    tokens: Count = 0
    values: tuple[LargestValue, ...] = ()

    @property
    def largest(self) -> LargestValue | None:
        """The largest of all; None if nothing was measured. A value that is not finite is the largest."""
        return max(self.values, key=lambda v: math.inf if v.value is None else v.value, default=None)
