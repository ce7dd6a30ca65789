"""The largest values of a 16-bit graph, and the floating-point type of a plan that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cushion_deploy.core.dtypes import Dtype, PlanDtype
from cushion_deploy.errors import UsageError
from cushion_deploy.store.digests import digest_json

HALF_MAX = 65504.0
"""Largest finite value of float16."""
MARGIN = 2.0
"""``auto`` is float16 only if the largest value times this is in its range: other text has larger values."""


@dataclass(frozen=True)
class LargestValue:
    """The largest magnitude in one part of a graph.

    Attributes:
        part: scope in the graph, such as ``layers.3.mlp``.
        tensor: operator that computes it, such as ``residual``.
        value: the magnitude; infinite if a value is not finite.
        token, token_id: the token at which it occurs.
        position: position of the token in its window; -1 in the prefix.
    """

    part: str
    tensor: str
    value: float
    token: str
    token_id: int
    position: int

    def words(self) -> str:
        """Return what reaches which value where, as part of a sentence."""
        what = "the residual stream" if self.tensor == "residual" else self.tensor
        size = f"{self.value:,.0f}" if math.isfinite(self.value) else "infinity"
        where = f"token {self.token!r} (position {self.position})" if self.position >= 0 else f"token {self.token!r}"
        return f"{what} reaches {size} in {self.part} at {where}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; an infinite value becomes None."""
        return {**asdict(self), "value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LargestValue:
        """Rebuild from :meth:`to_json`."""
        return cls(**{**data, "value": math.inf if data["value"] is None else data["value"]})


@dataclass(frozen=True)
class ValueRange:
    """The largest values of a graph on text behind its prefix.

    Attributes:
        values: the largest value in each part of the graph, in order of computation.
        corpus: name of the text.
        tokens: tokens of it that were run.
    """

    values: tuple[LargestValue, ...]
    corpus: str
    tokens: int

    @property
    def largest(self) -> LargestValue:
        """The largest of all."""
        return max(self.values, key=lambda found: found.value)

    @property
    def digest(self) -> str:
        """SHA-256 over the values."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"values": [v.to_json() for v in self.values], "corpus": self.corpus, "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ValueRange:
        """Rebuild from :meth:`to_json`."""
        return cls(tuple(map(LargestValue.from_json, data["values"])), data["corpus"], data["tokens"])


@dataclass(frozen=True)
class PlanType:
    """The floating-point type of plans, and what it was chosen from.

    Attributes:
        dtype: the type.
        wanted: the setting of the recipe, or ``auto``.
        measured: the values that it was chosen from; None if they do not matter for it.
    """

    dtype: Dtype
    wanted: PlanDtype
    measured: ValueRange | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over what was chosen and why."""
        return digest_json([self.dtype, self.wanted, self.measured.digest if self.measured else None])


def choose_plan_type(wanted: PlanDtype, measured: ValueRange | None) -> PlanType:
    """Return the type of plans: the one that is asked for, or float16 where its range has a margin of :data:`MARGIN`.

    Args:
        wanted: a type, or ``auto``.
        measured: the largest values of the graph in float16; not needed for a type with the range of float32.

    Raises:
        UsageError: float16 is asked for, and a value exceeds its range.
        ValueError: values are needed but missing.
    """
    if wanted in ("bfloat16", "float32"):
        return PlanType(wanted, wanted, measured)
    if measured is None:
        raise ValueError(f"the type {wanted} depends on the range of values")
    largest = measured.largest
    if wanted == "float16" and not largest.value <= HALF_MAX:
        raise UsageError(
            f"a float16 plan would overflow: {largest.words()}, but the float16 maximum is {HALF_MAX:,.0f}",
            hint="compile plans with --plan-dtype auto or bf16",
        )
    fits = wanted == "float16" or largest.value * MARGIN <= HALF_MAX
    return PlanType("float16" if fits else "bfloat16", wanted, measured)
