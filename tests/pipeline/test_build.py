"""The build as a function: stages kept by what decides them, an empty prefix end to end, nothing left by a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.pipeline.build import build, plan
from cushion_deploy.pipeline.reporting import merge_times
from cushion_deploy.pipeline.stages import calibrate, evaluate, export, search_prefix
from cushion_deploy.pipeline.workspace import StageTime, Workspace
from cushion_deploy.recipe import Recipe
from cushion_deploy.store import StageStore, verify_bundle

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.text_tokens": 64,
    "search.random_candidates": 8,
    "search.screen_candidates": 8,
    "search.audit_tokens": 4,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 64,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
}
MakeWorkspace = Callable[..., Workspace]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder that the tests of this file share."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def workspace(planted_folder: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeWorkspace:
    """Return a function that makes the workspace of one run; a new one each time, as in a process of its own."""
    texts = tmp_path_factory.mktemp("texts")
    (texts / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (texts / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    data = {"calibration.data": str(texts / "calib.txt"), "evaluation.data": str(texts / "eval.txt")}

    def make(work: Path = kept, model: Path = planted_folder, **more: object) -> Workspace:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        recipe = Recipe().merged({"model": str(model), **data, **SETTINGS, **changes})
        return Workspace(recipe, StageStore(work))

    return make


def reused(ws: Workspace) -> dict[str, bool]:
    """Return for every stage whether an earlier run's result served at its first use."""
    return {row["stage"]: row["reused"] for row in merge_times(ws.times)}


def test_a_change_runs_again_what_it_decides_and_nothing_else(workspace: MakeWorkspace) -> None:
    def run(**changes: object) -> dict[str, bool]:
        ws = workspace(**changes)
        prefix, _ = search_prefix(ws)
        scales = calibrate(ws, prefix).scales
        export(ws, prefix, scales, dtype="float32")
        return {name: value for name, value in reused(ws).items() if name != "load"}

    assert set(run().values()) <= {True, False}
    assert run() == {"search": True, "calibrate": True, "export": True}
    assert run(calibration__estimator="max") == {"search": True, "calibrate": False, "export": False}
    assert run(search__tau=0.6)["search"] is False
    assert run(export__quantize_head=True, calibration__estimator="max")["calibrate"] is True
    assert run(evaluation__max_tokens=128, parity__tokens=16) == {"search": True, "calibrate": True, "export": True}


def test_the_seed_decides_the_search(workspace: MakeWorkspace, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ws = workspace(tmp_path / name, seed=seed)
        prefix, trace = search_prefix(ws)
        found.append((prefix.token_ids, prefix.keys, {**trace.to_json(), "seconds": None}))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert found[0][2] != found[2][2]


def test_calibration_before_and_after_the_prefix_are_two_stages(workspace: MakeWorkspace) -> None:
    ws = workspace()
    prefix, _ = search_prefix(ws)
    assert prefix.length > 0
    result = evaluate(ws, prefix, calibrate(ws, prefix))
    assert {"calibrate", "calibrate-without-prefix"} <= set(reused(ws))
    columns = result["perplexity"]
    assert {"fp", "fp_prefix", "quantized", "quantized_prefix"} <= set(columns)
    assert len(result["magnitudes"]["with"]) == len(result["magnitudes"]["without"])


def test_no_prefix_leaves_no_prefix_in_graph_and_report(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(search__enabled=False)
    report = build(ws, tmp_path / "out")
    assert report.search is None
    assert report.perplexity.fp == report.perplexity.fp_prefix
    assert report.perplexity.quantized == report.perplexity.quantized_prefix
    assert json.loads((tmp_path / "out" / "export.json").read_text())["contract"]["prefix_length"] == 0
    manifest = verify_bundle(tmp_path / "out")
    assert manifest.recipe["search"]["enabled"] is False
    # The graph that was published is the graph that was checked.
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    assert (tmp_path / "out" / "model.onnx.data").stat().st_nlink == 1


def test_a_failure_leaves_no_bundle_and_keeps_what_was_finished(
    workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cushion_deploy.pipeline.build as module

    def broken(*_: Any) -> None:
        raise CheckFailed("the engine broke", hint="mend it")

    ws = workspace(tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(module, "compile_engine", broken)
        with pytest.raises(CheckFailed, match="the engine broke"):
            build(ws, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    again = workspace(tmp_path / "work")
    prefix, _ = search_prefix(again)
    export(again, prefix, calibrate(again, prefix).scales, dtype="float32")
    assert reused(again) == {"search": True, "calibrate": True, "export": True}


def test_two_builds_do_not_share_a_work_folder(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(tmp_path / "work")
    with ws.store.lock(), pytest.raises(UsageError, match="another build is using"):
        build(workspace(tmp_path / "work"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_workspace_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model was given"):
        plan(Workspace(Recipe(), StageStore(tmp_path / "w")), tmp_path / "out")


def test_a_plan_names_the_finished_stages(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace()
    search_prefix(ws)
    line = next(line for line in plan(workspace(), tmp_path / "out") if line.startswith("finished stages"))
    assert "search" in line
    assert "none" in "\n".join(plan(workspace(tmp_path / "new"), tmp_path / "out"))
    assert not (tmp_path / "new").exists()


def test_a_stage_asked_for_twice_is_one_row_and_not_reused() -> None:
    times = [StageTime("a", 2.0, False), StageTime("b", 1.0, True), StageTime("a", 0.5, True)]
    assert merge_times(times) == [
        {"stage": "a", "seconds": 2.5, "reused": False},
        {"stage": "b", "seconds": 1.0, "reused": True},
    ]
