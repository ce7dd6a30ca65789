"""The exported graph, the compiled engines, and the parity checks between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cushion_deploy.report.document.base import Count, FreeForm, StrictModel


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
    """A compiled engine: its number of INT8 linears, and whether it was run on the machine that built it."""

    engine: str
    targets: tuple[str, ...]
    linears: Count
    int8_linears: Count
    fused_attention: Count
    ran: bool
    note: str = ""
    details: FreeForm = Field(default_factory=dict)
