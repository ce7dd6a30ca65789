"""The built model, the graph and engines made from it with their parity checks, and the machine and time it took."""

from __future__ import annotations

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
