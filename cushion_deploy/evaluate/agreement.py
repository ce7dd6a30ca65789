"""Whether an artifact scores what its fake-quantized model scores: limits from the noise of the measurement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cushion_deploy.evaluate.perplexity import TextScore, standard_error
from cushion_deploy.evaluate.zeroshot import TaskScore

TEXT_LIMIT = 0.005
"""Relative difference of perplexity that is allowed beside twice its standard error."""


@dataclass(frozen=True)
class Agreement:
    """One comparison: the absolute difference against what is allowed.

    Attributes:
        name: text or task.
        metric: what was compared.
        difference: of perplexities as a share of the reference's, of a task's metric as it is.
        limit: the most that passes.
    """

    name: str
    metric: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; one that is no number never is."""
        return self.difference <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; what is not finite becomes null."""
        values = {k: (v if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**values, "passed": self.passed}


def texts_agree(name: str, artifact: TextScore, reference: TextScore) -> Agreement:
    """Compare perplexities on the same tokens: 0.5 %, and two standard errors of the paired difference."""
    if not (math.isfinite(artifact.perplexity) and math.isfinite(reference.perplexity)):
        return Agreement(name, "perplexity", math.nan, TEXT_LIMIT)
    paired = standard_error(artifact.losses - reference.losses)
    apart = abs(artifact.perplexity / reference.perplexity - 1)
    return Agreement(name, "perplexity", apart, TEXT_LIMIT + 2 * (0.0 if math.isnan(paired) else paired))


def tasks_agree(artifact: TaskScore, reference: TaskScore) -> Agreement:
    """Compare the main metric of a task: one standard error of the reference."""
    limit = 0.0 if reference.stderr is None else reference.stderr
    return Agreement(reference.task, reference.metric, abs(artifact.value - reference.value), limit)
