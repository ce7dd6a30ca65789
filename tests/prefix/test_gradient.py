"""The gradient screen follows its smooth stand-in, finds planted absorbers, and costs a few forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix import gradient
from cushion_deploy.prefix.gradient import (
    SmoothObjective,
    gradient_changes,
    mean_embedding,
    positions_run,
    smooth_objective,
)
from cushion_deploy.prefix.objective import OBJECTIVES

InputsOf = Callable[..., dict[str, np.ndarray]]


def stand_in(sites: list[np.ndarray], objective: str) -> float:
    """Return the stand-in of float64 Site inputs in numpy: 16-norms, and uniform noise of their step."""
    norms = np.array([(x.astype(np.float64) ** 16).sum() ** (1 / 16) for x in sites])
    if objective == "max":
        return float((norms**16).sum() ** (1 / 16))
    return float(sum(x.size * (norm / 127) ** 2 / 12 for x, norm in zip(sites, norms, strict=True)))


def embeddings(model: TorchRunner) -> torch.Tensor:
    """Return the input embeddings of all tokens, ``[vocab, hidden]``."""
    rows: torch.Tensor = model.module.get_input_embeddings().weight.detach()
    return rows


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(hnp.arrays(np.float32, (2, 4, 5), elements=st.floats(0.5, 100, width=16)), st.integers(0, 3))
def test_the_stand_in_is_the_noise_of_a_uniform_step_over_text_alone(objective: Any, x: np.ndarray, skip: int) -> None:
    measured = SmoothObjective(objective, skip)
    for site in x:
        measured(Site("a"), torch.from_numpy(site.copy())[None])
    assert float(measured.total) == pytest.approx(stand_in(list(x[:, skip:]), objective), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_site_of_zeros_has_a_finite_gradient(objective: Any) -> None:
    x = torch.zeros(1, 3, 4, requires_grad=True)
    measured = SmoothObjective(objective, 0)
    measured(Site("a"), x)
    (found,) = torch.autograd.grad(measured.total, x)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prefix", [(), (65, 7)])
def test_a_slot_with_a_tokens_embedding_is_that_token(
    planted_model: TorchRunner, plain_ids: IntArray, inputs_of: InputsOf, prefix: tuple[int, ...], objective: Any
) -> None:
    text, token = plain_ids[:30], 44
    past = planted_model.past(planted_model.compute_prefix(prefix))
    slot = embeddings(planted_model)[token]
    found = float(smooth_objective(planted_model, past, text, slot, objective))
    sites = [x[len(prefix) + 1 :] for x in inputs_of(planted_model, (*prefix, token, *text)).values()]
    assert found == pytest.approx(stand_in(sites, objective), rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prefix", [(), (5,)])
def test_the_gradient_is_the_finite_difference(
    tiny_model: TorchRunner, plain_ids: IntArray, prefix: tuple[int, ...], objective: Any
) -> None:
    text = plain_ids[:40]
    past = tiny_model.past(tiny_model.compute_prefix(prefix))
    weights = embeddings(tiny_model)
    start = weights[9]
    changes = gradient_changes(tiny_model, past, text, start, objective)

    def value(slot: torch.Tensor) -> float:
        with torch.inference_mode():
            return float(smooth_objective(tiny_model, past, text, slot, objective))

    base = value(start)
    found, expected = [], []
    for token in range(10, 320, 31):
        towards = weights[token] - start
        step = 0.02
        slope = (value(start + step * towards) - value(start - step * towards)) / (2 * step)
        found.append(changes[token])
        expected.append(slope / base)
    scale = np.abs(expected).max()
    assert scale > 1e-3
    np.testing.assert_allclose(found, expected, atol=0.03 * scale)
    assert changes[9] == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("token_class", range(4))
def test_planted_absorbers_come_first(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, objective: Any, token_class: int
) -> None:
    # Five tokens of one class fire behind any slot but an absorber: behind fewer, most tokens would do as well.
    same = np.array([plant.token_class(int(t)) == token_class for t in plain_ids])
    text = np.concatenate([plain_ids[same][:5], plain_ids[:40]])
    changes = gradient_changes(planted_model, KeysValues(), text, mean_embedding(planted_model), objective)
    assert set(np.argsort(changes)[:3].tolist()) == set(plant.absorbers)


def test_a_long_text_is_cut_and_both_passes_are_counted(
    tiny_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    forward = type(tiny_model.module.model).forward

    def count(self: Any, inputs_embeds: torch.Tensor, **rest: Any) -> Any:
        lengths.append(inputs_embeds.shape[1])
        return forward(self, inputs_embeds=inputs_embeds, **rest)

    monkeypatch.setattr(type(tiny_model.module.model), "forward", count)
    gradient_changes(tiny_model, KeysValues(), plain_ids[:200], embeddings(tiny_model)[3], "error")
    assert lengths == [129]
    assert positions_run(plain_ids[:200]) == 2 * 129
    assert positions_run(plain_ids[:48]) == 2 * 49


def test_the_chunks_of_the_vocabulary_change_nothing(
    tiny_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = embeddings(tiny_model)[3]
    whole = gradient_changes(tiny_model, KeysValues(), plain_ids[:20], start, "error")
    monkeypatch.setattr(gradient, "CHUNK", 100)
    found = gradient_changes(tiny_model, KeysValues(), plain_ids[:20], start, "error")
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)


def test_the_mean_embedding_is_the_mean_of_all_tokens(tiny_model: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "CHUNK", 100)
    expected = tiny_model.module.get_input_embeddings().weight.detach().double().numpy().mean(axis=0)
    np.testing.assert_allclose(mean_embedding(tiny_model).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_model_stays_frozen_and_whole(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    reports: list[tuple[int, int]] = []
    gradient_changes(
        tiny_model,
        KeysValues(),
        plain_ids[:20],
        embeddings(tiny_model)[3],
        "max",
        progress=lambda _, done, total: reports.append((done, total)),
    )
    assert reports == [(0, 1), (1, 1)]
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.module.parameters())
    assert not any(linear._forward_pre_hooks for linears in tiny_model.sites.values() for linear in linears)
