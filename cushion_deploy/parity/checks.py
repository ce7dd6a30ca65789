"""Results of the parity ladder: one check, and the report of all checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cushion_deploy.core.sites import Site


@dataclass(frozen=True)
class ParityCheck:
    """One check of one rung: ``value`` must be at most, or at least, ``limit``.

    Attributes:
        rung, metric: which check it is.
        value, limit: the measured value and its limit.
        direction: on which side of the limit the value must be.
        site: the Site where the two sides first differ; None if the check passes or no Site is to blame.
        note: further measurements, as text.
    """

    rung: str
    metric: str
    value: float
    limit: float
    direction: Literal["at most", "at least"]
    site: Site | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN never is."""
        if math.isnan(self.value):
            return False
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; a value that is not finite becomes None."""
        value = self.value if math.isfinite(self.value) else None
        return {**asdict(self), "value": value, "passed": self.passed}


@dataclass(frozen=True)
class ParityReport:
    """All checks of the ladder, in order.

    Attributes:
        checks: the checks.
        corpus: name of the text.
        tokens: number of tokens compared.
        unchecked: sentences about what could not be checked.
    """

    checks: tuple[ParityCheck, ...]
    corpus: str
    tokens: int
    unchecked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is at least one check and all of them pass."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "passed": self.passed,
            "corpus": self.corpus,
            "tokens": self.tokens,
            "checks": [c.to_json() for c in self.checks],
            "unchecked": list(self.unchecked),
        }
