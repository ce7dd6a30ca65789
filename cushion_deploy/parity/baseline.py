"""What a bundle reached once, kept to compare with: a check may hold its limit and still have become worse.

A limit says what a faithful graph reaches whatever the model; a baseline says what this one reached. A new version of
an engine, a driver or a model that loses accuracy moves away from it, and the check that moved names the Site.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.parity.checks import ParityCheck, ParityReport

SCHEMA = 1
RELATIVE, OF_LIMIT = 0.5, 0.02
"""A check may move by half of its value, or by this share of its limit where the value is next to nothing."""


@dataclass(frozen=True)
class Entry:
    """What one check reached.

    Attributes:
        rung, metric: which check.
        value: what it reached.
        tolerance: how far it may move to the worse, in the unit of the value.
    """

    rung: str
    metric: str
    value: float
    tolerance: float


def write_baseline(report: ParityReport, path: Path) -> None:
    """Write what every check of a report reached, with tolerances that people may edit.

    Raises:
        UsageError: a check of the report fails; that is nothing to compare with.
    """
    failed = [check for check in report.checks if not check.passed or not math.isfinite(check.value)]
    if failed:
        raise UsageError(
            f"no baseline is written: {failed[0].rung}, {failed[0].metric} fails",
            hint="make every check pass first",
        )
    entries = [
        {"rung": c.rung, "metric": c.metric, "value": c.value, "tolerance": _tolerance(c)} for c in report.checks
    ]
    text = json.dumps({"schema": SCHEMA, "checks": entries}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_baseline(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a baseline.

    Raises:
        UsageError: there is no such file.
        UntrustedArtifact: it is no baseline.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r}, expected {SCHEMA}")
        return tuple(_entry(entry) for entry in found["checks"])
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}", hint="write one with --write-baseline") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UntrustedArtifact(f"{path} is no baseline: {e}", hint="write it again with --write-baseline") from e


def compare_baseline(report: ParityReport, baseline: Sequence[Entry]) -> ParityReport:
    """Return the report with one more check for each of the baseline's, on rung ``baseline: <rung>``.

    A check of the baseline that the report does not have fails: something is no longer checked.
    """
    found = {(check.rung, check.metric): check for check in report.checks}
    more = []
    for entry in baseline:
        check = found.get((entry.rung, entry.metric))
        rung = f"baseline: {entry.rung}"
        if check is None:
            note = "the baseline has this check and the bundle has not"
            more.append(ParityCheck(rung, entry.metric, math.nan, entry.value, "at most", None, note))
            continue
        worse = entry.tolerance if check.direction == "at most" else -entry.tolerance
        note = f"{entry.value:g} in the baseline, tolerance {entry.tolerance:g}"
        more.append(
            ParityCheck(rung, entry.metric, check.value, entry.value + worse, check.direction, check.site, note)
        )
    return replace(report, checks=(*report.checks, *more))


def _tolerance(check: ParityCheck) -> float:
    """Return how far a check may move: by a share of its distance from perfect, or of its limit's."""
    if check.direction == "at most":
        return max(RELATIVE * abs(check.value), OF_LIMIT * abs(check.limit))
    # Shares of 1: 0.9998 may lose half of what it lacks.
    return max(RELATIVE * abs(1 - check.value), OF_LIMIT * abs(1 - check.limit))


def _entry(data: Any) -> Entry:
    value, tolerance = float(data["value"]), float(data["tolerance"])
    if not (math.isfinite(value) and math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"{data['metric']}: value {value} with tolerance {tolerance}")
    return Entry(str(data["rung"]), str(data["metric"]), value, tolerance)
