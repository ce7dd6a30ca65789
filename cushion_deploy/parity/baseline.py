"""A baseline: the recorded parity values of a bundle, to detect checks that become worse within their limits.

A limit holds for every faithful graph of any model; a baseline holds what this bundle reached. If a new version of an
engine, a driver or a model loses accuracy, the values move away from the baseline, and the check names the Site.
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
from cushion_deploy.store.files import write_file
from cushion_deploy.store.text_files import decode_utf8

SCHEMA = 1
RELATIVE, OF_LIMIT = 0.5, 0.02
"""Tolerance of a check: half of its value, or this share of its limit if that is larger."""


@dataclass(frozen=True)
class Entry:
    """The recorded value of one check.

    Attributes:
        rung, metric: which check it is.
        value: the recorded value.
        tolerance: how much worse it may become, in the unit of the value.
    """

    rung: str
    metric: str
    value: float
    tolerance: float


def write_baseline(report: ParityReport, path: Path) -> None:
    """Write the value of every check of a report, with tolerances that can be edited.

    Raises:
        UsageError: a check of the report fails, or the file cannot be written.
    """
    failed = [check for check in report.checks if not check.passed or not math.isfinite(check.value)]
    if failed:
        raise UsageError(
            f"no baseline is written, because a check fails: {failed[0].rung}, {failed[0].metric}",
            hint="make every check pass first",
        )
    entries = [
        {"rung": c.rung, "metric": c.metric, "value": c.value, "tolerance": _tolerance(c)} for c in report.checks
    ]
    text = json.dumps({"schema": SCHEMA, "checks": entries}, indent=1)
    write_file(path, (text + "\n").encode())


def read_baseline(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a baseline.

    Raises:
        UsageError: the file cannot be read, or is not UTF-8.
        UntrustedArtifact: it is not a baseline.
    """
    try:
        found = json.loads(decode_utf8(path.read_bytes(), str(path)))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r}, expected {SCHEMA}")
        return tuple(_entry(entry) for entry in found["checks"])
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}", hint="write one with --write-baseline") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UntrustedArtifact(f"{path} is not a baseline: {e}", hint="write it again with --write-baseline") from e


def compare_baseline(report: ParityReport, baseline: Sequence[Entry]) -> ParityReport:
    """Return the report with a check for each entry of the baseline, on rung ``baseline: <rung>``.

    An entry whose check is missing in the report fails, because something is no longer checked.
    """
    found = {(check.rung, check.metric): check for check in report.checks}
    more = []
    for entry in baseline:
        check = found.get((entry.rung, entry.metric))
        rung = f"baseline: {entry.rung}"
        if check is None:
            note = "the baseline has this check, the report does not"
            more.append(ParityCheck(rung, entry.metric, math.nan, entry.value, "at most", None, note))
            continue
        worse = entry.tolerance if check.direction == "at most" else -entry.tolerance
        note = f"{entry.value:g} in the baseline, tolerance {entry.tolerance:g}"
        more.append(
            ParityCheck(rung, entry.metric, check.value, entry.value + worse, check.direction, check.site, note)
        )
    return replace(report, checks=(*report.checks, *more))


def _tolerance(check: ParityCheck) -> float:
    """Return the tolerance of a check: a share of its distance from the ideal value, or of the limit's."""
    if check.direction == "at most":
        return max(RELATIVE * abs(check.value), OF_LIMIT * abs(check.limit))
    # The ideal value is 1: 0.9998 may fall by half of the missing 0.0002.
    return max(RELATIVE * abs(1 - check.value), OF_LIMIT * abs(1 - check.limit))


def _entry(data: Any) -> Entry:
    value, tolerance = float(data["value"]), float(data["tolerance"])
    if not (math.isfinite(value) and math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"{data['metric']}: value {value} with tolerance {tolerance}")
    return Entry(str(data["rung"]), str(data["metric"]), value, tolerance)
