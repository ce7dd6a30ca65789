"""Every family goes through the whole build: search, smoothing, calibration, tuning, export, engines, parity."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cushion_deploy.core.artifacts import read_prefix, write_prefix
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import Report
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore, verify_bundle
from cushion_deploy.verbs.build import build
from cushion_deploy.verbs.engine import add_engine
from cushion_deploy.verbs.parity import check_bundle

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime", *(["tensorrt-rtx"] if RTX else [])],
    "search.seed_tokens": ["<s>"],
    "search.ship": "always",
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


CACHED = "qwen3"
"""The family that is built with the prefix in the cache as well."""


@pytest.fixture(scope="module")
def reports(variant_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a variant to the report of its build and the bundle."""
    made: dict[str, tuple[Report, Path]] = {}
    texts = tmp_path_factory.mktemp("texts")
    (texts / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (texts / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 8)
    data = {"calibration.data": str(texts / "calib.txt"), "evaluation.data": str(texts / "eval.txt")}

    work = tmp_path_factory.mktemp("work")

    def report(name: str, prefix: str = "baked") -> tuple[Report, Path]:
        key = f"{name}-{prefix}"
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "bundle"
            changes = {"model": str(variant_folder(name)), **data, **SETTINGS, "export.prefix": prefix}
            made[key] = build(Recipe().merged(changes), Run(StageStore(work / name)), out), out
        return made[key]

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


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is an optional extra: pip install 'cushion-deploy[rtx]'")
@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
def test_attention_behind_sliding_windows_is_fused(name: str, reports: Any) -> None:
    report, _ = reports(name)
    (plan,) = (engine for engine in report.engines if engine.engine.startswith("tensorrt-rtx"))
    assert plan.fused_attention == report.model.layers


def test_tuning_ran_from_what_was_found(variant: str, reports: Any) -> None:
    report, _ = reports(variant)
    assert report.tuning.states[0].step == 0
    assert report.tuning.states[-1].step == 2


def test_a_bundle_with_the_prefix_in_the_cache_is_the_bundle_with_the_prefix_in_the_graph(reports: Any) -> None:
    _, baked = reports(CACHED)
    report, cached = reports(CACHED, "cache")
    assert [check for check in report.parity if not check.passed] == []
    for engine in report.engines:
        assert engine.int8_linears == engine.linears > 0, engine
    stored = onnx.load(cached / "model.onnx", load_external_data=False).graph.initializer
    assert not any(tensor.name.startswith("prefix.") for tensor in stored)
    # onnxruntime-genai begins with an empty cache.
    assert (baked / "genai_config.json").is_file()
    assert not (cached / "genai_config.json").exists()
    ids = np.arange(5, 45, dtype=np.int64)[None]
    both = [open_session(open_bundle(path).graph, threads=1) for path in (baked, cached)]
    expected, found = (session.run(ids, need_logits="all") for session in both)
    # The same codes up to a tie of rounding: float attention sums in another order.
    assert np.abs(expected - found).max() <= 1e-3 * np.abs(expected).max()
    assert [session.length for session in both] == [40, 40]
    assert open_bundle(cached).prefix_mode == "cache"
    assert not open_bundle(cached).graph.contract.cache_capacity, "other runtimes know a cache that grows"


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is an optional extra: pip install 'cushion-deploy[rtx]'")
def test_a_plan_updates_a_cache_that_begins_with_the_prefix_in_place(reports: Any, tmp_path: Path) -> None:
    for prefix in ("baked", "cache"):
        report, bundle = reports(CACHED, prefix)
        form = " with a static cache" if prefix == "cache" else ""
        assert f"float16 graph{form} against the float32 graph" in {check.rung for check in report.parity}
        made = json.loads((bundle / "engines" / "tensorrt-rtx" / "engine.json").read_text())
        assert ("write_indices" in made["details"]["profiles"]["decode"]) is (prefix == "cache")
    opened = open_bundle(bundle)
    recipe, run = Recipe.from_bundle(opened.manifest.recipe), Run(StageStore(tmp_path / "work"))
    # Shorter than the text of the parity checks, of 40 tokens.
    options = CompileOptions(("sm86",), max_context=20)
    artifact = add_engine(recipe, run, opened, ENGINES["tensorrt-rtx"], options, tmp_path / "shorter")
    assert artifact.int8_linears == artifact.linears > 0
    slots = 20 + opened.graph.contract.prefix_length
    assert artifact.details["profiles"]["decode"]["past_key_values"][0][2] == slots
    again = check_bundle(recipe, run, tmp_path / "shorter", opened.graph)
    assert "float16 graph with a static cache against the float32 graph" in {check.rung for check in again.checks}
    assert again.passed


def test_a_cache_does_not_begin_with_the_prefix_of_another_bundle(reports: Any, tmp_path: Path) -> None:
    _, cached = reports(CACHED, "cache")
    graph = open_bundle(cached).graph
    folder = tmp_path / "copy"
    shutil.copytree(cached, folder)
    other = read_prefix(folder / "prefix.safetensors")
    write_prefix(replace(other, keys=other.keys * 2), folder / "prefix.safetensors")
    with pytest.raises(UntrustedArtifact, match="was made for another prefix"):
        open_session(replace(graph, path=folder / "model.onnx"))
    with pytest.raises(UsageError, match="every cache begins with a prefix"):
        OnnxRuntimeSession(graph.path, graph.contract)
    with pytest.raises(UntrustedArtifact):
        open_bundle(folder)
