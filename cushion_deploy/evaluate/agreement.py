"""Agreement between the scores of an engine and of fake quantization, within the noise of the measurement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cushion_deploy.core.statistics import standard_error
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.evaluate.zeroshot import TaskScore

TEXT_LIMIT = 0.005
"""Allowed relative difference of perplexity, in addition to twice its standard error."""


@dataclass(frozen=True)
class Agreement:
    """One comparison: the absolute difference and its limit.

    Attributes:
        name: text or task.
        metric: the compared metric.
        difference: relative to the reference for perplexity, absolute for the metric of a task.
        limit: largest difference that passes.
    """

    name: str
    metric: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN never is."""
        return self.difference <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; values that are not finite become null."""
        values = {k: (v if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**values, "passed": self.passed}


def texts_agree(name: str, artifact: TextScore, reference: TextScore) -> Agreement:
    """Compare perplexities on the same tokens; the limit is 0.5 % plus two standard errors of the paired difference."""
    if not (math.isfinite(artifact.perplexity) and math.isfinite(reference.perplexity)):
        return Agreement(name, "perplexity", math.nan, TEXT_LIMIT)
    paired = standard_error(artifact.losses - reference.losses)
    difference = abs(artifact.perplexity / reference.perplexity - 1)
    return Agreement(name, "perplexity", difference, TEXT_LIMIT + 2 * (0.0 if math.isnan(paired) else paired))


def tasks_agree(artifact: TaskScore, reference: TaskScore) -> Agreement:
    """Compare the main metric of a task; the limit is one standard error of the reference."""
    limit = 0.0 if reference.stderr is None else reference.stderr
    return Agreement(reference.task, reference.metric, abs(artifact.value - reference.value), limit)
