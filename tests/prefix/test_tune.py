"""Tuning follows the gradient of what it says it minimizes, keeps the best state, and goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.prefix import tune
from cushion_deploy.prefix.tune import PrefixTuning, fake_quantize
from cushion_deploy.recipe import Tuning

SCHEME = QuantScheme(quantize_head=False)
MakeTuning = Callable[..., PrefixTuning]


def scales_of(model: TorchRunner, prefix: Prefix, value: float = 0.02) -> ActivationScales:
    """Return the same scale for every Site."""
    found = dict.fromkeys(model.sites, float(np.float32(value)))
    return ActivationScales(found, "max", Lineage(model.spec.weights_digest, prefix.digest, text="c"), 1)


@pytest.fixture
def tuning(planted_model: TorchRunner, plain_ids: IntArray) -> MakeTuning:
    """Return a maker of small tunings of the token 97."""

    def make(scratch: Path | None = None, model: TorchRunner = planted_model, **config: Any) -> PrefixTuning:
        small: dict[str, Any] = {"epochs": 2, "batch": 2, "judge_every": 2, "checkpointing": False}
        prefix = model.compute_prefix((97,))
        windows = plain_ids[: 8 * 16].reshape(8, 16)
        settings = Tuning(**{**small, **config})
        quantization = Quantization(prefix, SCHEME, scales_of(model, prefix))
        return PrefixTuning(model, quantization, windows[:6], windows[6:], settings, 7, scratch)

    return make


def test_fake_quantization_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 126.6, 500.0, -500.0])
    assert fake_quantize(x, torch.tensor(1.0)).tolist() == [0, 2, -2, 127, 127, -128]


def test_gradients_of_fake_quantization_are_straight_through_and_learned_step_size() -> None:
    x = torch.tensor([0.3, 1.6, 300.0, -300.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale).backward(torch.ones(4))
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    # Esser et al., Eq. 3: round(x/s) - x/s inside, the clipping code outside.
    assert float(scale.grad) == pytest.approx((0 - 0.3) + (2 - 1.6) + 127 - 128, abs=1e-5)


@pytest.mark.parametrize("loss", ["ce", "distill"])
def test_losses_are_those_of_the_simulated_model(tuning: MakeTuning, planted_model: TorchRunner, loss: str) -> None:
    t = tuning(loss=loss)
    ids = t.train[:2]
    with t.quantized(), torch.no_grad():
        prediction, _ = t.losses(ids)
    with simulated(planted_model, SCHEME, t.scales):
        quantized = torch.log_softmax(torch.from_numpy(planted_model.logits(ids, t.prefix)[:, :-1]).double(), -1)
        nll = planted_model.token_nll(ids, t.prefix).mean()
    plain = planted_model.logits(ids, Prefix.empty(planted_model.spec))[:, :-1]
    teacher = torch.log_softmax(torch.from_numpy(plain).double(), -1)
    kl = float((teacher.exp() * (teacher - quantized)).sum(-1).mean())
    assert float(prediction) == pytest.approx(nll if loss == "ce" else kl, rel=1e-4)


def test_the_error_is_that_of_equation_6(
    tuning: MakeTuning, planted_model: TorchRunner, inputs_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    # One Site only: behind a quantized Site the inputs of the next are others than those of the plain model.
    t = tuning()
    first = next(iter(t.sites))
    t.sites = {first: t.sites[first]}
    with t.quantized(), torch.no_grad():
        _, error = t.losses(t.train[:1])
    x = inputs_of(planted_model, (97, *t.train[0]))[first][1:]
    step = np.float32(0.02)
    expected = ((x - np.clip(np.rint(x / step), -128, 127) * step) ** 2).sum() / 16
    assert float(error) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", ["ce", "distill"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_finite_differences(
    tuning: MakeTuning, monkeypatch: pytest.MonkeyPatch, loss: str, checkpointing: bool
) -> None:
    """With the rounding left out the losses are smooth, and straight-through is the true gradient."""
    monkeypatch.setattr(tune, "fake_quantize", lambda x, scale, bits: torch.tanh(x / scale / 400) * scale * 400)
    t = tuning(loss=loss, checkpointing=checkpointing)
    ids, rng = t.train[:2], np.random.default_rng(0)
    with t.quantized():
        prediction, _ = t.losses(ids)
        prediction.backward()
        for name in ("keys", "values", "log_scales"):
            parameter = t.parameters[name]
            gradient = parameter.grad
            assert gradient is not None
            direction = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            step = 3e-3
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * step * direction
                    found.append(float(t.losses(ids)[0]))
                    parameter -= sign * step * direction
            numeric = (found[0] - found[1]) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=0.05, abs=2e-4), name


def test_running_layers_again_changes_no_gradient(tuning: MakeTuning) -> None:
    gradients = []
    for checkpointing in (False, True):
        t = tuning(checkpointing=checkpointing)
        with t.quantized():
            prediction, error = t.losses(t.train[:2])
            (prediction + 0.1 * error).backward()
        gradients.append([t.parameters[name].grad for name in ("keys", "values", "log_scales")])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_best_state_is_kept_and_the_start_counts(tuning: MakeTuning) -> None:
    t = tuning(learning_rate=50.0, scale_learning_rate=3.0, clip=1e9)
    prefix, scales, trace = t.run()
    assert trace.best.step == 0, [s.held_out for s in trace.states]
    np.testing.assert_array_equal(prefix.keys, t.prefix.keys)
    assert scales.scales == pytest.approx(t.scales.scales)


def test_tuning_improves_what_it_is_judged_by(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    prefix, scales, trace = tuning(epochs=8, learning_rate=0.01, scale_learning_rate=0.1).run()
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


def test_scales_stay_where_the_recipe_says_so(tuning: MakeTuning) -> None:
    t = tuning(scales=False)
    _, scales, _ = t.run()
    assert scales.scales == t.scales.scales


def test_a_killed_tuning_goes_on_where_it_was(
    tuning: MakeTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    whole_prefix, whole_scales, whole = tuning().run()
    killed = tuning(tmp_path)

    def die(task: str, done: int, total: int, note: str = "") -> None:
        if task.startswith("tuning") and done == 3:
            raise KeyboardInterrupt

    killed.progress = die
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again = tuning(tmp_path)
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


def test_an_empty_prefix_cannot_be_tuned(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    none = Prefix.empty(planted_model.spec)
    rows = plain_ids[:32].reshape(2, 16)
    with pytest.raises(UsageError, match="no prefix to tune"):
        PrefixTuning(planted_model, Quantization(none, SCHEME, scales_of(planted_model, none)), rows, rows, Tuning())


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
    real = t.losses

    def losses(ids: IntArray) -> Any:
        prediction, error = real(ids)
        return (prediction * float("nan") if torch.is_grad_enabled() else prediction), error

    monkeypatch.setattr(t, "losses", losses)
    prefix, _, trace = t.run()
    assert (trace.skipped, trace.best.step) == (trace.steps, 0)
    assert trace.states[-1].prediction is None
    np.testing.assert_array_equal(prefix.keys, t.prefix.keys)
    assert json.loads(json.dumps(trace.to_json(), allow_nan=False))["skipped"] == trace.steps


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tuning: MakeTuning) -> None:
    t = tuning(epochs=1)
    looks = iter([0.5, float("nan"), float("inf"), 0.4])
    t._judge = lambda: (next(looks, 0.6), 1.0)  # type: ignore[method-assign]
    _, _, trace = t.run()
    assert [s.held_out for s in trace.states] == [0.5, None, None]
    assert trace.best.step == 0
