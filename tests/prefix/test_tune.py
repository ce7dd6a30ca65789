"""Tuning keeps the best state of held-out text, keeps the sink in the prefix, and goes on after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.prefix import tune
from cushion_deploy.prefix.tune import Judged, PrefixTuning
from cushion_deploy.prefix.tuning_loss import Losses
from cushion_deploy.recipe import Tuning

SCHEME = QuantScheme(quantize_head=False)
MakeTuning = Callable[..., PrefixTuning]


def error(model: TorchRunner, prefix: Prefix, row: IntArray, step: float = 0.02) -> float:
    """Return L_q of a window behind a prefix, with the same scale at every Site but the head."""
    found: list[float] = []

    def add(site: str, x: torch.Tensor) -> None:
        values, scale = x.numpy(), np.float32(step)
        off = (values - np.clip(np.rint(values / scale), -128, 127) * scale).astype(np.float64)
        found.append(float((off**2).sum()) if site != "head" else 0.0)

    with observed(model, add):
        model.logits(row[None], prefix)
    return sum(found)


def divergences(model: TorchRunner, prefix: Prefix, rows: IntArray) -> np.ndarray:
    """Return KL(without prefix || behind the prefix) of every prediction, float64 ``[windows, length - 1]``."""
    scores = []
    for before in (Prefix.empty(model.spec), prefix):
        logits = model.logits(rows, before)[:, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        scores.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    found: np.ndarray = (np.exp(scores[0]) * (scores[0] - scores[1])).sum(-1)
    return found


@pytest.mark.parametrize("loss", ["distill", "invisible"])
def test_the_best_state_is_kept_and_the_start_counts(tuning: MakeTuning, loss: str) -> None:
    t = tuning(loss=loss, learning_rate=50.0, scale_learning_rate=3.0, clip=1e9)
    prefix, scales, trace = t.run()
    assert trace.best.step == 0, [s.held_out for s in trace.states]
    np.testing.assert_array_equal(prefix.keys, t.prefix.keys)
    assert scales.scales == pytest.approx(t.scales.scales)


def test_tuning_improves_what_it_is_judged_by(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    prefix, scales, trace = tuning(loss="distill", epochs=8, learning_rate=0.01, scale_learning_rate=0.1).run()
    assert trace.best.held_out < 0.9 * trace.states[0].held_out
    assert scales.lineage.prefix == prefix.digest
    assert [s.step for s in trace.states] == [0, *range(2, 25, 2)]
    # The kept state does outside of the tuning what the trace says of it.
    t = tuning()
    held_out = []
    for row in t.held_out:
        with simulated(planted_model, SCHEME, scales):
            quantized = torch.log_softmax(torch.from_numpy(planted_model.logits(row[None], prefix)[:, :-1]), -1)
        plain = planted_model.logits(row[None], Prefix.empty(planted_model.spec))[:, :-1]
        teacher = torch.log_softmax(torch.from_numpy(plain), -1)
        held_out.append(float((teacher.exp() * (teacher - quantized)).sum(-1).mean()))
    assert np.mean(held_out) == pytest.approx(trace.best.held_out, rel=2e-2)


def test_a_prefix_becomes_invisible_to_the_unquantized_model(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    t = tuning(loss="invisible", epochs=10, learning_rate=0.1, window=32)
    prefix, scales, trace = t.run()
    assert scales.scales == t.scales.scales
    assert scales.lineage.prefix == prefix.digest
    start, best = trace.states[0], trace.best
    for state, kept in ((start, t.prefix), (best, prefix)):
        found = divergences(planted_model, kept, t.held_out)
        assert state.whole == pytest.approx(found.mean(), rel=1e-3)
        assert state.later == pytest.approx(found[:, 16:].mean(), rel=1e-3)
        weights = np.where(np.arange(31) < 16, 0.25, 1.0)
        barrier = 0.01 * (state.held_out_error or math.nan)
        assert state.held_out == pytest.approx(np.average(found.mean(0), weights=weights) + barrier, rel=1e-3)
    assert start.held_out_error == 1.0
    ratios = [np.divide(*(error(planted_model, kept, row) for kept in (prefix, t.prefix))) for row in t.held_out]
    assert best.held_out_error == pytest.approx(np.mean(ratios), rel=1e-3)
    assert best.later < 0.5 * start.later
    assert best.held_out == min(s.held_out for s in trace.states)


@pytest.mark.parametrize(("error_weight", "kept"), [(0.01, True), (0.0, False)])
def test_the_quantization_error_keeps_the_sink_in_the_prefix(
    planted_model: TorchRunner, plain_ids: IntArray, error_weight: float, kept: bool
) -> None:
    """Tuned until it is invisible from the first position on, a prefix alone gives the sink back to the text."""
    model, windows = planted_model, plain_ids[: 12 * 24].reshape(12, 24)
    prefix = model.compute_prefix((97,))

    def largest(before: Prefix) -> float:
        sizes: list[float] = []
        with observed(model, lambda _, x: sizes.append(float(x.abs().max()))):
            model.logits(windows[8:], before)
        return max(sizes)

    histograms = observe_sites(model, prefix, windows, np.ones_like(windows))
    scales = choose_scales(histograms, RangeEstimator("max"), model.lineage(prefix), 1)
    settings = {"first_weight": 1.0, "epochs": 80, "batch": 8, "learning_rate": 0.3, "checkpointing": False}
    config = Tuning(error_weight=error_weight, **settings)
    start = Quantization(prefix, SCHEME, scales)
    tuned, _, trace = PrefixTuning(model, start, windows[:8], windows[8:], config).run()
    assert trace.best.step > 0
    assert largest(prefix) < 20 < 500 < largest(Prefix.empty(model.spec))
    assert (largest(tuned) < 20) is kept
    assert (largest(tuned) > 300) is not kept
    # Not only the state that was kept: the sink never came back.
    assert all((state.held_out_error or math.nan) < 1.2 for state in trace.states) is kept


def test_a_state_that_buys_invisibility_with_quantization_error_is_not_kept(tuning: MakeTuning) -> None:
    looks = iter([Judged(0.5, 1.0, 0.5, 0.5), Judged(0.1, 50.0, 0.1, 0.1), Judged(0.4, 1.1, 0.4, 0.4)])
    t = tuning(loss="invisible", epochs=2, batch=6, judge_every=1)
    t._judge = lambda: next(looks)  # type: ignore[method-assign]
    trace = t.run()[2]
    assert [s.held_out for s in trace.states] == pytest.approx([0.51, 0.1 + 0.01 * 50, 0.4 + 0.01 * 1.1])
    assert trace.best.step == 2


@pytest.mark.parametrize(("steps", "rise"), [(300, 10), (40, 4), (4, 1)])
def test_the_cosine_begins_with_a_warm_up(tuning: MakeTuning, steps: int, rise: int) -> None:
    t = tuning(epochs=steps, batch=6)
    rates = [t._schedule(step) for step in range(steps)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates[rise:] == cosine[rise:]
    assert rates[:rise] == pytest.approx([(i + 1) / rise * cosine[i] for i in range(rise)])
    assert set(map(tuning(schedule="constant")._schedule, range(4))) == {1.0}


def test_a_pass_has_the_windows_that_its_device_is_best_used_with(tuning: MakeTuning) -> None:
    t = tuning(batch=5)
    assert t.rows_per_pass == 1
    for device, streamed, rows in (("cuda", (), 5), ("cpu", (0, 1), 5), ("cpu", (), 1)):
        placed = SimpleNamespace(streamed_layers=streamed)
        t.model = SimpleNamespace(device=torch.device(device), placed=placed)  # type: ignore[assignment]
        assert t.rows_per_pass == rows
    assert tuning(batch=5, microbatch=3).rows_per_pass == 3


def test_windows_in_one_pass_or_in_several_are_the_same_steps(tuning: MakeTuning) -> None:
    one, several = (tuning(batch=4, microbatch=rows, epochs=3).run() for rows in (4, 3))
    np.testing.assert_allclose(one[0].keys, several[0].keys, rtol=1e-3, atol=1e-4)
    for state, other in zip(one[2].states, several[2].states, strict=True):
        assert state.held_out == pytest.approx(other.held_out, rel=1e-3)


def test_a_prefix_of_eight_tokens_is_tuned(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    t = tuning(tokens=(97, 5, 6, 7, 8, 9, 10, 11), epochs=4, learning_rate=0.1)
    prefix, _, trace = t.run()
    assert prefix.length == 8
    assert trace.best.step > 0
    assert (prefix.keys != t.prefix.keys).any((0, 1, 3)).all(), "every position"


def test_scales_stay_where_the_recipe_says_so(tuning: MakeTuning) -> None:
    t = tuning(loss="distill", scales=False)
    _, scales, _ = t.run()
    assert scales.scales == t.scales.scales


@pytest.mark.parametrize("loss", ["distill", "invisible"])
def test_a_killed_tuning_goes_on_where_it_was(
    tuning: MakeTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    whole_prefix, whole_scales, whole = tuning(loss=loss).run()
    killed = tuning(tmp_path, loss=loss)

    def die(task: str, done: int, total: int, note: str = "") -> None:
        if task.startswith("tuning") and done == 3:
            raise KeyboardInterrupt

    killed.progress = die
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again = tuning(tmp_path, loss=loss)
    begun: list[int] = []
    again.progress = lambda task, done, total, *_: begun.append(done) if task.startswith("tuning") else None
    prefix, scales, trace = again.run()
    assert begun[0] == 4
    np.testing.assert_array_equal(prefix.keys, whole_prefix.keys)
    assert scales.scales == whole_scales.scales
    assert trace.states == whole.states


def test_a_checkpoint_of_another_tuning_is_not_taken(
    tuning: MakeTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    tuning(tmp_path, epochs=1).run()
    assert set(load((tmp_path / "tuning.safetensors").read_bytes())) >= {"now.keys", "best.keys", "adam.keys.exp_avg"}
    begun: list[int] = []
    other = tuning(tmp_path, epochs=1, learning_rate=0.002)
    other.progress = lambda task, done, total, *_: begun.append(done) if task.startswith("tuning") else None
    other.run()
    assert begun[0] == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "no facts"])
def test_a_damaged_checkpoint_of_a_tuning_begins_it_again(
    tuning: MakeTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    whole, _, _ = tuning(tmp_path, epochs=1).run()
    file = tmp_path / "tuning.safetensors"
    raw = file.read_bytes()
    damaged = {"empty": b"", "cut": raw[:-10], "text": b"not a checkpoint", "no facts": save({"x": np.zeros(1)})}
    file.write_bytes(damaged[damage])
    begun: list[int] = []
    again = tuning(tmp_path, epochs=1)
    again.progress = lambda task, done, total, *_: begun.append(done) if task.startswith("tuning") else None
    prefix, _, _ = again.run()
    assert begun[0] == 1
    np.testing.assert_array_equal(prefix.keys, whole.keys)
    assert "tuning.safetensors is damaged, so the tuning begins again" in caplog.text


def test_an_empty_prefix_cannot_be_tuned(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    none = Prefix.empty(planted_model.spec)
    rows = plain_ids[:32].reshape(2, 16)
    with pytest.raises(UsageError, match="no prefix to tune"):
        PrefixTuning(planted_model, Quantization(none, SCHEME, None), rows, rows, Tuning())


def test_the_model_is_as_it_was_afterwards(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    ids = torch.arange(5, 25)[None]
    before = planted_model.module(input_ids=ids).logits
    tuning(epochs=1, checkpointing=True).run()
    assert torch.equal(planted_model.module(input_ids=ids).logits, before)
    assert all(p.grad is None and not p.requires_grad for p in planted_model.module.parameters())


def test_a_tuning_that_runs_away_keeps_the_start_and_can_be_told(
    tuning: MakeTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tuning(epochs=1)
    real = t.loss.of

    def losses(ids: IntArray) -> Losses:
        found = real(ids)
        return replace(found, prediction=found.prediction * math.nan) if torch.is_grad_enabled() else found

    monkeypatch.setattr(t.loss, "of", losses)
    prefix, _, trace = t.run()
    assert (trace.skipped, trace.best.step) == (trace.steps, 0)
    assert trace.states[-1].prediction is None
    np.testing.assert_array_equal(prefix.keys, t.prefix.keys)
    assert json.loads(json.dumps(trace.to_json(), allow_nan=False))["skipped"] == trace.steps


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tuning: MakeTuning) -> None:
    t = tuning(epochs=1)
    looks = iter([0.5, math.nan, math.inf, 0.4])
    t._judge = lambda: Judged(next(looks, 0.6), 1.0, 1.0, 1.0)  # type: ignore[method-assign]
    _, _, trace = t.run()
    assert [s.held_out for s in trace.states] == [0.51, None, None]
    assert trace.best.step == 0
