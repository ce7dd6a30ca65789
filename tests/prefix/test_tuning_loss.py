"""The losses of tuning are what they say, of the quantized or the unquantized model, and so are their gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.prefix import tuning_loss
from cushion_deploy.prefix.tune import PrefixTuning
from cushion_deploy.prefix.tuning_loss import fake_quantize
from cushion_deploy.stages import resources

SCHEME = QuantScheme(quantize_head=False)
MakeTuning = Callable[..., PrefixTuning]


def ready(tuning: PrefixTuning) -> AbstractContextManager[None]:
    """Return the context in which the losses of a tuning may be computed."""
    return tuning.loss.ready(tuning.train)


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
    with ready(t), torch.no_grad():
        found = t.loss.of(ids)
    with simulated(planted_model, SCHEME, t.scales):
        quantized = torch.log_softmax(torch.from_numpy(planted_model.logits(ids, t.prefix)[:, :-1]).double(), -1)
        nll = planted_model.token_nll(ids, t.prefix).mean()
    plain = planted_model.logits(ids, Prefix.empty(planted_model.spec))[:, :-1]
    teacher = torch.log_softmax(torch.from_numpy(plain).double(), -1)
    kl = float((teacher.exp() * (teacher - quantized)).sum(-1).mean())
    assert float(found.prediction) == pytest.approx(nll if loss == "ce" else kl, rel=1e-4)
    assert float(found.tokens.mean()) == pytest.approx(float(found.prediction), rel=1e-5)


@pytest.mark.parametrize("first_weight", [0.25, 1.0])
def test_invisibility_is_the_weighted_divergence_of_the_unquantized_model(
    tuning: MakeTuning, planted_model: TorchRunner, first_weight: float
) -> None:
    t = tuning(loss="invisible", window=40, first_weight=first_weight)
    ids = t.train[:3]
    with ready(t), torch.no_grad():
        found = t.loss.of(ids)
    expected = np.zeros((3, 39))
    for row, tokens in enumerate(ids):
        scores = []
        for before in ([], [97]):
            # Without a cache or hooks of ours.
            out = planted_model.module(input_ids=torch.tensor([[*before, *tokens]]), use_cache=False)
            logits = out.logits[0, len(before) : -1].detach().double().numpy()
            shifted = logits - logits.max(-1, keepdims=True)
            scores.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
        for position in range(39):
            p, q = scores[0][position], scores[1][position]
            expected[row, position] = (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(found.tokens.numpy(), expected, rtol=1e-3, atol=1e-5)
    # 16 positions of each row count less, 23 fully.
    total = first_weight * expected[:, :16].sum() + expected[:, 16:].sum()
    assert float(found.prediction) == pytest.approx(total / (3 * (16 * first_weight + 23)), rel=1e-4)


def test_the_error_of_an_invisible_prefix_is_that_of_the_unquantized_inputs(
    tuning: MakeTuning, planted_model: TorchRunner, inputs_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    t = tuning(loss="invisible")
    with ready(t), torch.no_grad():
        error = t.loss.of(t.train[:2]).error
    expected, step = [0.0, 0.0], np.float32(0.02)
    for i, row in enumerate(t.train[:2]):
        for x in inputs_of(planted_model, (97, *row)).values():
            expected[i] += ((x[1:] - np.clip(np.rint(x[1:] / step), -128, 127) * step) ** 2).sum() / 16
    assert error.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_invisible_loss_are_finite_differences(tuning: MakeTuning, checkpointing: bool) -> None:
    """With so large a scale that all codes are zero, L_q is smooth: the mean square of what enters the Sites."""
    t = tuning(loss="invisible", scale=1000.0, checkpointing=checkpointing, window=24)
    ids, rng = t.train[:2], np.random.default_rng(0)

    def total() -> torch.Tensor:
        found = t.loss.of(ids)
        return found.prediction + 0.1 * found.error.mean()

    with ready(t):
        total().backward()
        for name in ("keys", "values"):
            parameter = t.parameters[name]
            gradient = parameter.grad
            assert gradient is not None
            direction = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * 3e-3 * direction
                    found.append(float(total()))
                    parameter -= sign * 3e-3 * direction
            assert float((gradient * direction).sum()) == pytest.approx((found[0] - found[1]) / 6e-3, rel=0.05), name
    assert t.parameters["log_scales"].grad is None


def test_the_rounded_values_are_constants(tuning: MakeTuning, planted_model: TorchRunner) -> None:
    """Beyond the range of the codes, the gradient draws inputs to the largest code: the closed form of 2 (x - q)."""
    t = tuning(loss="invisible", scale=1e-6)
    with ready(t):
        (of_codes,) = torch.autograd.grad(t.loss.of(t.train[:1]).error, t.parameters["values"])
    t = tuning(loss="invisible", scale=1000.0)
    with ready(t):
        (of_squares,) = torch.autograd.grad(t.loss.of(t.train[:1]).error, t.parameters["values"])
    # Codes of at most 128 millionths are nothing beside the inputs, so both are the gradient of the mean square.
    torch.testing.assert_close(of_codes, of_squares, rtol=1e-2, atol=1e-4 * float(of_squares.abs().max()))


@pytest.mark.parametrize("loss", ["invisible", "distill", "ce"])
def test_logits_in_pieces_are_the_logits(tuning: MakeTuning, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    found = []
    for positions in (1024, 10):
        monkeypatch.setattr(tuning_loss, "POSITIONS", positions)
        t = tuning(loss=loss, checkpointing=True)
        with ready(t):
            losses = t.loss.of(t.train[:2])
            losses.prediction.backward()
        assert losses.tokens.shape == (2, 15)
        found.append((losses.tokens, t.parameters["keys"].grad))
    for one, pieces in zip(*found, strict=True):
        torch.testing.assert_close(one, pieces)


def test_a_quantized_head_has_an_error_in_every_piece(
    tuning: MakeTuning, planted_model: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_loss, "POSITIONS", 10)
    t = tuning(loss="invisible", scale=1000.0, head=True)
    t.loss.sites = {"head": planted_model.sites["head"]}
    with ready(t), torch.no_grad():
        error = t.loss.of(t.train[:2]).error.tolist()
        states = [planted_model.run(torch.tensor([[97, *row]]), KeysValues(), head=False) for row in t.train[:2]]
    squares = [float(s.last_hidden_state[0, 1:].double().square().sum()) for s in states]
    assert error == pytest.approx([square / 16 for square in squares], rel=1e-4)


def test_nothing_that_was_run_again_is_kept(tuning: MakeTuning) -> None:
    t = tuning(checkpointing=True)
    made: list[StorageWeakRef] = []
    with ready(t):
        whole, add = t.loss.of(t.train[:1]), t.loss._add

        def watched(difference: torch.Tensor) -> None:
            made.append(StorageWeakRef(difference.untyped_storage()))
            add(difference)

        t.loss._add = watched  # type: ignore[method-assign]
        (whole.prediction + whole.error.sum()).backward()
        assert made, "layers were run again"
        gc.collect()
        assert all(storage.expired() for storage in made)


def test_the_error_is_that_of_equation_6(
    tuning: MakeTuning, planted_model: TorchRunner, inputs_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    # One Site only: behind a quantized Site the inputs of the next are others than those of the plain model.
    t = tuning(loss="distill")
    first = next(iter(t.sites))
    t.loss.sites = {first: t.sites[first]}
    with ready(t), torch.no_grad():
        error = t.loss.of(t.train[:1]).error
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
    monkeypatch.setattr(tuning_loss, "fake_quantize", lambda x, scale, bits: torch.tanh(x / scale / 400) * scale * 400)
    t = tuning(loss=loss, checkpointing=checkpointing)
    ids, rng = t.train[:2], np.random.default_rng(0)
    with ready(t):
        t.loss.of(ids).prediction.backward()
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
                    found.append(float(t.loss.of(ids).prediction))
                    parameter -= sign * step * direction
            numeric = (found[0] - found[1]) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=0.05, abs=2e-4), name


@pytest.mark.parametrize("loss", ["invisible", "distill"])
def test_running_layers_again_changes_no_gradient(tuning: MakeTuning, loss: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        t = tuning(loss=loss, checkpointing=checkpointing)
        with ready(t):
            found = t.loss.of(t.train[:2])
            (found.prediction + 0.1 * found.error.sum()).backward()
        gradients.append([p.grad for p in t.parameters.values() if p.requires_grad])
    assert len(gradients[0]) == (3 if loss == "distill" else 2)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_estimate_of_memory_knows_how_many_positions_have_logits_at_once() -> None:
    # Copied there, because an estimate must not import torch.
    assert resources.POSITIONS == tuning_loss.POSITIONS
