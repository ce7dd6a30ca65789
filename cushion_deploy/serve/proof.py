"""What a bundle says about itself: the four columns, engines, INT8 coverage and parity of its report."""

from __future__ import annotations

import logging
from typing import Any

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.report.document import read_report
from cushion_deploy.report.scores import COLUMNS, chat_rows, perplexity_rows
from cushion_deploy.report.statements import coverage, not_run_reason, parity_sentence, prefix_sentence, verdict
from cushion_deploy.runtime.bundle import Bundle

REPORT = "report/report.json"
_LOG = logging.getLogger(__name__)


def bundle_proof(bundle: Bundle, engine: str) -> dict[str, Any]:
    """Return the proof as JSON: every number as the report prints it.

    ``report`` is None if there is no report, or none that this version can read: such a bundle can be served all the
    same, because generating needs no report.

    Args:
        bundle: the verified bundle.
        engine: the engine that serves it.
    """
    proof: dict[str, Any] = {"engine": engine, "report": None}
    if REPORT not in bundle.manifest.files:
        return proof
    try:
        report = read_report(bundle.path / REPORT)
    except UntrustedArtifact as e:
        _LOG.warning("the page shows no report: %s", e)
        return proof
    outcome = verdict(report)
    rows = [*perplexity_rows(report.perplexity), *chat_rows(report.chat)] if report.perplexity else []
    proof["report"] = {
        "status": outcome.status,
        "sentence": outcome.sentence,
        "columns": list(COLUMNS),
        "rows": [{"name": name, "cells": list(cells)} for name, cells in rows],
        "prefix": prefix_sentence(report),
        "parity": parity_sentence(report),
        "engines": [
            {
                "name": e.engine,
                "targets": list(e.targets),
                "coverage": coverage(e),
                "note": "" if e.ran else not_run_reason(e),
                "serves": e.engine == engine,
            }
            for e in report.engines
        ],
    }
    return proof
