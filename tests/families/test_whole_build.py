"""Every family goes through the whole build: search, smoothing, calibration, tuning, export, engines, parity."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.pipeline.build import build
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import Report
from cushion_deploy.store import StageStore, verify_bundle

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime", *(["tensorrt-rtx"] if RTX else [])],
    "search.seed_tokens": ["<s>"],
    "search.max_length": 2,
    "search.text_tokens": 48,
    "search.random_candidates": 4,
    "search.screen_candidates": 4,
    "search.gradient_candidates": 4,
    "search.audit_tokens": 4,
    "calibration.windows": 2,
    "calibration.window": 48,
    "tuning.enabled": True,
    "tuning.windows": 4,
    "tuning.window": 32,
    "tuning.held_out": 2,
    "tuning.batch": 2,
    "tuning.epochs": 1,
    "evaluation.window": 48,
    "evaluation.max_tokens": 96,
    "parity.tokens": 40,
    "parity.decode_tokens": 3,
}


@pytest.fixture(scope="module")
def reports(variant_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a variant to the report of its build and the bundle."""
    made: dict[str, tuple[Report, Path]] = {}
    texts = tmp_path_factory.mktemp("texts")
    (texts / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (texts / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 8)
    data = {"calibration.data": str(texts / "calib.txt"), "evaluation.data": str(texts / "eval.txt")}

    def report(name: str) -> tuple[Report, Path]:
        if name not in made:
            work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out") / "bundle"
            recipe = Recipe().merged({"model": str(variant_folder(name)), **data, **SETTINGS})
            made[name] = build(Workspace(recipe, StageStore(work)), out), out
        return made[name]

    return report


def test_every_parity_check_holds(variant: str, reports: Any) -> None:
    report, bundle = reports(variant)
    assert [check for check in report.parity if not check.passed] == []
    rungs = {check.rung for check in report.parity}
    assert len(rungs) >= 5, rungs
    assert len(report.search.token_ids) >= 1
    verify_bundle(bundle)


def test_every_linear_runs_in_int8(variant: str, reports: Any) -> None:
    report, _ = reports(variant)
    for engine in report.engines:
        assert engine.int8_linears == engine.linears > 0, engine
        assert engine.engine.startswith(("onnxruntime", "tensorrt-rtx"))


def test_tuning_ran_from_what_was_found(variant: str, reports: Any) -> None:
    report, _ = reports(variant)
    assert report.tuning.states[0].step == 0
    assert report.tuning.states[-1].step == 2
