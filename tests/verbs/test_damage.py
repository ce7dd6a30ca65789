"""The damage of plain W8A8, its Sites and what remedies remove, against numpy and the views that a build makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.calib.calibrate import choose_scales, observe_rotated, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kind_costs import kind_costs, kind_of
from cushion_deploy.calib.smooth import choose_smoothing
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import ROTATIONS, Recipe, SmoothQuant
from cushion_deploy.verbs.damage import Damage, Step, damage_warnings, examine_damage
from cushion_deploy.verbs.trial import Cost, Trial

SCHEME = QuantScheme(quantize_head=False)
Array = np.ndarray


def windows_of(ids: IntArray) -> IntArray:
    return ids[:432].reshape(9, 48)


def scales_of(model: TorchRunner, windows: IntArray) -> ActivationScales:
    none = model.no_prefix()
    found = observe_sites(model, none, windows, np.ones_like(windows))
    return choose_scales(found, RangeEstimator("max"), model.lineage(none), windows.size)


def by_hand(model: TorchRunner, windows: IntArray, scales: dict[Site, float], only: Callable[[str], bool]) -> Array:
    """Return log probabilities ``[windows, length, vocab]`` with hooks and weights of ours: numpy's rounding."""
    undo, handles = [], []
    for site, linears in model.sites.items():
        if site == "head" or not only(site):
            continue
        step = np.float32(scales[site])
        for linear in linears:
            weight = linear.weight.detach().clone()
            undo.append((linear, weight))
            array = weight.numpy()
            rows = np.maximum(np.abs(array).max(1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
            linear.weight.data = torch.from_numpy(np.rint(array / rows) * rows)

            def round_input(_: Any, args: Any, step: Any = step) -> Any:
                return (torch.from_numpy(np.clip(np.rint(args[0].numpy() / step), -128, 127) * step),)

            handles.append(linear.register_forward_pre_hook(round_input))
    with torch.inference_mode():
        logits = model.module(input_ids=torch.from_numpy(windows), use_cache=False).logits.double()
    for handle in handles:
        handle.remove()
    for linear, weight in undo:
        linear.weight.data = weight
    found: Array = torch.log_softmax(logits, -1).numpy()
    return found


def apart(original: Array, other: Array) -> Array:
    """Return KL(original || other) of every prediction."""
    found: Array = (np.exp(original) * (original - other)).sum(-1)[:, :-1]
    return found


@pytest.fixture
def trial(planted_model: TorchRunner, plain_ids: IntArray) -> Trial:
    recipe = Recipe().merged({"calibration.estimator": "max"})
    return Trial(planted_model, windows_of(plain_ids), recipe, lambda *_: None)


def test_the_cost_is_perplexity_and_divergence_of_numpys_rounding(trial: Trial, planted_model: TorchRunner) -> None:
    judged = trial.windows[2::3]
    scales = scales_of(planted_model, np.delete(trial.windows, [2, 5, 8], axis=0))
    original = by_hand(planted_model, judged, scales.scales, lambda _: False)
    quantized = by_hand(planted_model, judged, scales.scales, lambda _: True)
    found = examine_damage(trial, planted_model.no_prefix(), "nothing").plain
    loss = [-np.take_along_axis(logits[:, :-1], judged[:, 1:, None], -1).mean() for logits in (original, quantized)]
    assert [found.fp, found.quantized] == pytest.approx(np.exp(loss), rel=1e-3)
    assert found.divergence == pytest.approx(apart(original, quantized).mean(), rel=2e-3)
    assert found.later == pytest.approx(apart(original, quantized)[:, 16:].mean(), rel=2e-3)
    assert found.tokens == 3 * 47


def test_the_kind_of_the_planted_sink_is_to_blame(planted_model: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    windows, none = windows_of(plain_ids)[:2], planted_model.no_prefix()
    scales = scales_of(planted_model, windows_of(plain_ids))
    found = kind_costs(planted_model, none, SCHEME, scales, windows)
    original = by_hand(planted_model, windows, scales.scales, lambda _: False)
    for kind, value in found.kinds.items():
        other = by_hand(planted_model, windows, scales.scales, lambda site, kind=kind: site.endswith(kind))
        assert value == pytest.approx(apart(original, other).mean(), rel=0.03, abs=2e-6), kind
    assert list(found.kinds.values()) == sorted(found.kinds.values(), reverse=True)
    assert set(found.kinds) == {"attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"}
    assert next(iter(found.kinds)) == "mlp.down"


def test_the_worst_sites_are_measured_without_the_others_of_their_kind(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cushion_deploy.calib.kind_costs.WORST", 1)
    windows = windows_of(plain_ids)[:2]
    scales = scales_of(planted_model, windows_of(plain_ids))
    found = kind_costs(planted_model, planted_model.no_prefix(), SCHEME, scales, windows)
    sink = f"layers.{plant.layer}.mlp.down"
    assert [site for site, _ in found.worst] == [sink]
    original = by_hand(planted_model, windows, scales.scales, lambda _: False)
    alone = apart(original, by_hand(planted_model, windows, scales.scales, lambda site: site == sink)).mean()
    assert found.together == pytest.approx(alone, rel=1e-3)
    assert found.kinds["mlp.down"] != pytest.approx(alone, rel=2e-3)


def test_what_rounding_takes_is_the_mean_share_of_tokens(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any
) -> None:
    windows = windows_of(plain_ids)[:2]
    scales = scales_of(planted_model, windows_of(plain_ids))
    # Of the layers that run behind quantized ones the input differs, so the first one of the kind is compared.
    site = Site(f"layers.{plant.layer}.mlp.down")
    inputs: list[Array] = []
    handle = planted_model.sites[site][0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].numpy()))
    with torch.inference_mode():
        planted_model.module(input_ids=torch.from_numpy(windows), use_cache=False)
    handle.remove()
    x, step = inputs[0], np.float32(scales.scales[site])
    shares = ((np.clip(np.rint(x / step), -128, 127) * step - x) ** 2).sum(-1) / (x**2).sum(-1)
    found = dict(kind_costs(planted_model, planted_model.no_prefix(), SCHEME, scales, windows).worst)
    assert found[site] == pytest.approx(shares.mean(), rel=0.02)
    assert shares.mean() > 10 * ((x - np.rint(x / step) * step) ** 2).sum() / (x**2).sum(), "the sink hides the others"


def test_one_pass_counts_a_site_as_it_is_and_as_it_is_rotated(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    windows, none = windows_of(plain_ids), planted_model.no_prefix()
    everything = np.ones_like(windows)
    smoothing = choose_smoothing(planted_model, none, windows, everything, SmoothQuant(alpha=None))
    assert smoothing.rotations
    plain, rotated = observe_rotated(planted_model, none, windows, everything, smoothing.rotations)
    views = {
        "plain": (plain, observe_sites(planted_model, none, windows, everything)),
        "rotated": (rotated, observe_sites(planted_model.folded(smoothing), none, windows, everything)),
    }
    for name, (found, expected) in views.items():
        for site, histogram in expected.items():
            assert found[site].amax == pytest.approx(histogram.amax, rel=1e-3), (name, site)
            assert int(found[site].counts.sum()) == int(histogram.counts.sum())
    site = next(iter(smoothing.rotations))
    assert plain[site].amax != pytest.approx(rotated[site].amax, rel=0.05)


def test_every_remedy_is_added_to_those_before_it(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, trial: Trial
) -> None:
    prefix = planted_model.compute_prefix(plant.absorbers[:1])
    found = examine_damage(trial, prefix, "the absorber")
    assert [step.remedy for step in found.steps] == ["the absorber", "SmoothQuant", "the rotation"]
    assert found.built is found.steps[-1].cost
    left = found.plain.distance - sum(removed for _, removed in found.removed)
    assert left == pytest.approx(found.built.distance)
    calibrated = np.delete(trial.windows, [2, 5, 8], axis=0)
    # The last step is what the stages compute: smoothing behind the prefix, then scales of the folded model.
    smoothing = choose_smoothing(planted_model, prefix, calibrated, np.ones_like(calibrated), SmoothQuant())
    view = planted_model.folded(smoothing)
    histograms = observe_sites(view, prefix, calibrated, np.ones_like(calibrated))
    scales = trial.scales(histograms, view, prefix)
    expected = trial.cost(view, prefix, scales, "")
    assert found.built.divergence == pytest.approx(expected.divergence, rel=1e-3)
    # The steps before it: the model itself, and the smoothed model without the rotation.
    for step, one in zip(found.steps, (None, replace(smoothing, rotations={})), strict=False):
        view = planted_model.folded(one)
        scales = trial.scales(observe_sites(view, prefix, calibrated, np.ones_like(calibrated)), view, prefix)
        assert step.cost.divergence == pytest.approx(trial.cost(view, prefix, scales, "").divergence, rel=1e-5)


def test_a_recipe_without_rotation_is_told_what_it_would_bring(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    off = {f"smoothing.{name}": 0 for name in ROTATIONS}

    def examine(**changes: object) -> Damage:
        recipe = Recipe().merged({**changes})
        trial = Trial(planted_model, windows_of(plain_ids), recipe, lambda *_: None)
        return examine_damage(trial, planted_model.no_prefix(), "nothing")

    without, usual, nothing = examine(**off), examine(), examine(**off, **{"smoothing.alpha": None})
    assert [(step.remedy, step.built) for step in without.steps] == [("SmoothQuant", True), ("the rotation", False)]
    assert without.built is without.steps[0].cost
    assert usual.built.distance == pytest.approx(without.steps[1].cost.distance, rel=1e-4)
    assert [(step.remedy, step.built) for step in nothing.steps] == [("the rotation", False)]
    assert nothing.built is nothing.plain


@pytest.mark.parametrize(
    ("tokens", "window", "same"), [((1,), 0, True), ((1,), 49, True), ((1,), 48, False), ((1, 2), 0, False)]
)
def test_a_bos_is_no_prefix_unless_windows_move_past_it(tokens: tuple[int, ...], window: int, same: bool) -> None:
    model = SimpleNamespace(bare_tokens=(1,), spec=SimpleNamespace(smallest_window=window))
    trial = SimpleNamespace(model=model, windows=np.zeros((1, 48)))
    prefix = SimpleNamespace(token_ids=tokens, length=len(tokens))
    assert Trial.same_as_without(trial, prefix) is same  # type: ignore[arg-type]


def cost(later: float) -> Cost:
    return Cost(100, 20.0, 21.0, later + 0.01, later)


@pytest.mark.parametrize(
    ("plain", "steps", "words"),
    [
        (0.03, [("SmoothQuant", 0.02, True)], []),
        (0.5, [("SmoothQuant", 0.2, True)], ["still diverges by 0.200"]),
        (0.5, [("SmoothQuant", 0.04, True), ("the rotation", 0.01, False)], ["the recipe disables the rotation"]),
        (0.5, [("SmoothQuant", 0.04, True), ("the rotation", 0.0399, False)], []),
        (0.01, [("SmoothQuant", 0.03, True)], ["SmoothQuant raises the divergence by 0.020 to 0.030"]),
        (0.01, [("SmoothQuant", float("nan"), True)], ["still diverges by nan"]),
    ],
)
def test_warnings_follow_the_damage(plain: float, steps: list[tuple[str, float, bool]], words: list[str]) -> None:
    made = tuple(Step(name, cost(later), built) for name, later, built in steps)
    found = list(damage_warnings(Damage(cost(plain), made, None)))  # type: ignore[arg-type]
    assert len(found) == len(words)
    assert all(expected in sentence for expected, sentence in zip(words, found, strict=True))


def test_the_kind_of_a_site_is_its_name_without_the_layer() -> None:
    assert [kind_of(Site(name)) for name in ("layers.11.mlp.down", "head")] == ["mlp.down", "head"]
