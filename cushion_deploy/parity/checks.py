"""The nouns of the parity ladder: one measured claim, and the report of all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cushion_deploy.core.sites import Site


@dataclass(frozen=True)
class ParityCheck:
    """One measured claim of one rung: ``value`` against ``limit`` in the stated direction."""

    rung: str
    metric: str
    value: float
    limit: float
    direction: Literal["at most", "at least"]
    site: Site | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the claim holds; a value that is not a number never does."""
        if math.isnan(self.value):
            return False
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; a value that is not finite becomes null."""
        value = self.value if math.isfinite(self.value) else None
        return {**asdict(self), "value": value, "passed": self.passed}


@dataclass(frozen=True)
class ParityReport:
    """Every check of the ladder, in order; ``unchecked`` says in sentences what it could not look at."""

    checks: tuple[ParityCheck, ...]
    corpus: str
    tokens: int
    unchecked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there was at least one check and all hold."""
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
