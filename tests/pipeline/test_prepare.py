"""What is deployed follows the recipe: smoothing, float Sites by name or by cost, tuning; each kept and reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cushion_deploy.core.artifacts import SMOOTHING_FILE, write_smoothing
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.pipeline.build import build
from cushion_deploy.pipeline.prepare import prepare, read_deployed, site_costs
from cushion_deploy.pipeline.reporting import merge_times
from cushion_deploy.pipeline.stages import search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.store import StageStore

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.seed_tokens": ["a"],
    "search.max_length": 1,
    "search.text_tokens": 64,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 64,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
    "tuning.windows": 4,
    "tuning.held_out": 2,
    "tuning.window": 32,
    "tuning.judge_every": 1,
}
MakeWorkspace = Callable[..., Workspace]


@pytest.fixture
def workspace(planted_folder: Path, tmp_path: Path) -> MakeWorkspace:
    """Return a function that makes the workspace of one run on the same store."""
    (tmp_path / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 30)
    (tmp_path / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    data = {"calibration.data": str(tmp_path / "calib.txt"), "evaluation.data": str(tmp_path / "eval.txt")}

    def make(**more: object) -> Workspace:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        recipe = Recipe().merged({"model": str(planted_folder), **data, **SETTINGS, **changes})
        return Workspace(recipe, StageStore(tmp_path / "work"))

    return make


def test_sites_named_and_sites_that_cost_most_stay_in_float(workspace: MakeWorkspace) -> None:
    ws = workspace()
    prefix, _ = search_prefix(ws)
    plain = prepare(ws, prefix)
    costs = site_costs(ws, plain)
    assert list(costs) == [site for site in ws.model.sites if site != HEAD_SITE]
    worst = sorted(costs, key=lambda site: -costs[site])
    ws = workspace(export__keep_float=["auto:2", worst[0]])
    chosen = prepare(ws, prefix).scheme.float_sites
    assert set(chosen) == set(worst[:3])
    assert list(chosen) == [site for site in costs if site in chosen], "in the order of the computation"


def test_the_cost_of_a_site_is_the_divergence_when_it_alone_is_quantized(workspace: MakeWorkspace) -> None:
    ws = workspace()
    prefix, _ = search_prefix(ws)
    deployed = prepare(ws, prefix)
    costs = site_costs(ws, deployed)
    site = max(costs, key=lambda s: costs[s])
    model = ws.folded(deployed.smoothing)
    ids = ws.model.encode(ws.corpus(ws.recipe.calibration.data, "calibration").text)
    window = 256 - prefix.length
    rows = ids[: len(ids) // window * window].reshape(-1, window)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(2, len(rows))).astype(int))]
    others = tuple(other for other in costs if other != site)
    with simulated(model, QuantScheme(quantize_head=False, float_sites=others), deployed.scales):
        quantized = model.logits(rows, prefix)[:, :-1].astype(np.float64)
    plain = model.logits(rows, prefix)[:, :-1].astype(np.float64)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(plain), log_softmax(quantized)
    assert costs[site] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("wish", "message"), [("layers.9.attn.qkv", "no quantized Site"), ("auto:x", "auto:x"), ("auto:0", "auto:0")]
)
def test_a_wish_that_cannot_be_met_is_refused(workspace: MakeWorkspace, wish: str, message: str) -> None:
    ws = workspace(export__keep_float=[wish])
    prefix, _ = search_prefix(ws)
    with pytest.raises(UsageError, match=message):
        prepare(ws, prefix)


def test_tuning_hands_on_its_prefix_and_scales_and_is_reused(workspace: MakeWorkspace) -> None:
    ws = workspace(tuning__enabled=True, tuning__learning_rate=0.01)
    prefix, _ = search_prefix(ws)
    deployed = prepare(ws, prefix)
    assert deployed.tuning is not None
    assert deployed.tuning.states[0].step == 0
    assert deployed.scales.lineage.prefix == deployed.prefix.digest
    moved = deployed.tuning.best.step > 0
    assert np.array_equal(deployed.prefix.keys, prefix.keys) is not moved
    assert np.array_equal(prepare(ws, prefix, tuned=False).prefix.keys, prefix.keys)
    again = workspace(tuning__enabled=True, tuning__learning_rate=0.01)
    np.testing.assert_array_equal(prepare(again, prefix).prefix.keys, deployed.prefix.keys)
    assert all(row["reused"] for row in merge_times(again.times) if row["stage"] != "load")


def test_without_tuned_scales_the_scales_are_calibrated_behind_the_tuned_prefix(workspace: MakeWorkspace) -> None:
    ws = workspace(tuning__enabled=True, tuning__scales=False, tuning__learning_rate=0.05)
    prefix, _ = search_prefix(ws)
    deployed = prepare(ws, prefix)
    assert deployed.scales.lineage.prefix == deployed.prefix.digest
    assert deployed.scales.estimator == ws.recipe.calibration.estimator


def test_a_tuned_build_with_float_sites_holds_the_ladder(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(tuning__enabled=True, export__keep_float=["layers.1.mlp.down"])
    report = build(ws, tmp_path / "out")
    assert [row for row in report.parity if not row.passed] == []
    assert report.tuning is not None
    assert report.export is not None
    assert (report.export.float_sites, report.export.float_linears) == (("layers.1.mlp.down",), 1)
    assert report.export.linears + report.export.float_linears == 21
    (engine,) = report.engines
    assert engine.int8_linears == engine.linears == 20
    assert report.perplexity is not None
    assert report.perplexity.divergence is not None
    assert report.perplexity.divergence.fp == pytest.approx(0, abs=1e-5)


def test_a_bundle_tells_what_it_deploys_and_foreign_smoothing_is_refused(
    workspace: MakeWorkspace, tmp_path: Path
) -> None:
    ws = workspace(export__keep_float=["layers.1.mlp.down"])
    prefix, _ = search_prefix(ws)
    made = prepare(ws, prefix)
    build(ws, tmp_path / "out")
    graph = open_bundle(tmp_path / "out").graph
    read = read_deployed(workspace(), tmp_path / "out", graph)
    assert (read.prefix.digest, read.scales, read.scheme) == (made.prefix.digest, made.scales, made.scheme)
    assert read.smoothing is not None
    assert made.smoothing is not None
    assert read.smoothing.digest == made.smoothing.digest
    factors = {site: 2 * factor for site, factor in made.smoothing.factors.items()}
    write_smoothing(replace(made.smoothing, factors=factors), tmp_path / "out" / SMOOTHING_FILE)
    with pytest.raises(UntrustedArtifact, match="another smoothing"):
        read_deployed(workspace(), tmp_path / "out", graph)


def test_sites_are_compared_on_windows_that_fit_behind_the_prefix(workspace: MakeWorkspace) -> None:
    ws = workspace(export__keep_float=["auto:1"])
    assert ws.model.spec.max_positions == 256
    prefix, _ = search_prefix(ws)
    lengths: list[int] = []
    deployed = prepare(workspace(), prefix)
    with observed(ws.folded(deployed.smoothing), lambda _, x: lengths.append(x.shape[1])):
        site_costs(ws, deployed)
    assert max(lengths) + prefix.length <= 256
