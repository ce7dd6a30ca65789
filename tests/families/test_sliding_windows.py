"""Torch keeps a prefix in sight of every family's windows, in every kind of pass; the original model lets it go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.past_key_values import keys_values
from cushion_deploy.modeling.session import TorchSession
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.recipe import Compute

CLOSE = 1e-4
PREFIX, LENGTH, PADDING = (7, 1, 100), 40, 6
IDS = np.random.default_rng(5).integers(3, 320, (2, LENGTH))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


@pytest.fixture
def rows(variant: str, expected_of: Any) -> list[np.ndarray]:
    """Return what transformers says of both rows behind the prefix, ``[LENGTH, vocab]`` each."""
    return [expected_of(variant, row.tolist(), PREFIX) for row in IDS]


def test_at_once_and_past_the_window(variant: str, load_variant: Any, rows: list[np.ndarray]) -> None:
    model = load_variant(variant)
    assert largest(model.logits(IDS, model.compute_prefix(PREFIX)), np.stack(rows)) <= CLOSE


def test_pieces_and_single_tokens_through_the_cache(variant: str, load_variant: Any, rows: list[np.ndarray]) -> None:
    model = load_variant(variant)
    session = TorchSession(model, model.compute_prefix(PREFIX))
    pieces = ((0, 9), (9, 10), (10, 11), (11, 30), *((i, i + 1) for i in range(30, LENGTH)))
    found = [session.run(IDS[:1, begin:end], need_logits="all") for begin, end in pieces]
    assert largest(np.concatenate(found, axis=1)[0], rows[0]) <= CLOSE
    session.truncate(20)
    assert largest(session.run(IDS[:1, 20:], need_logits="all")[0], rows[0][20:]) <= CLOSE
    session.reset()
    assert largest(session.run(IDS[:1], need_logits="all")[0], rows[0]) <= CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(
    variant: str, side: str, load_variant: Any, rows: list[np.ndarray], expected_of: Any
) -> None:
    model, part = load_variant(variant), slice(PADDING, None) if side == "left" else slice(None, -PADDING)
    mask = np.zeros_like(IDS)
    mask[0], mask[1, part] = 1, 1
    expected = rows[0], expected_of(variant, IDS[1, part].tolist(), PREFIX)
    with torch.inference_mode():
        past = model.past(model.compute_prefix(PREFIX))
        whole = model.run(torch.from_numpy(IDS), past, torch.from_numpy(mask)).logits.numpy()
    assert largest(whole[0], expected[0]) <= CLOSE
    assert largest(whole[1, part], expected[1]) <= CLOSE


@torch.inference_mode()
def test_a_cache_that_is_kept_tells_the_prefix_from_the_text(
    variant: str, load_variant: Any, rows: list[np.ndarray]
) -> None:
    model = load_variant(variant)
    past = model.past(model.compute_prefix(PREFIX))
    out = model.run(torch.from_numpy(IDS[:, :30]), past, keep_cache=True)
    again = keys_values(out.past_key_values, past.kept)
    assert largest(model.run(torch.from_numpy(IDS[:, 30:]), again).logits.numpy(), np.stack(rows)[:, 30:]) <= CLOSE


def test_a_streamed_model_is_the_resident_one(variant: str, load_variant: Any) -> None:
    resident = load_variant(variant)
    source = resolve_source(str(resident.folder))
    streamed = load_folder(resident.folder, source, compute=Compute(device="cpu", memory=0))
    assert streamed.placed.streamed_layers
    found = [model.token_nll(IDS, model.compute_prefix(PREFIX)) for model in (resident, streamed)]
    np.testing.assert_array_equal(*found)


def test_the_original_model_lets_its_first_tokens_go(variant: str, load_variant: Any, expected_of: Any) -> None:
    model = load_variant(variant)
    sliding = replace(model.compute_prefix(PREFIX), slides=True)
    original = np.stack([expected_of(variant, row.tolist(), PREFIX, sliding=True) for row in IDS])
    assert largest(model.logits(IDS, sliding), original) <= CLOSE
    differs = largest(model.logits(IDS, model.compute_prefix(PREFIX)), original) > 100 * CLOSE
    assert differs == any(model.spec.windows)
    assert (sliding.digest == model.compute_prefix(PREFIX).digest) is False


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_the_teacher_is_the_original_model(name: str, load_variant: Any, expected_of: Any) -> None:
    model = load_variant(name)
    teacher = Teacher(model)
    teacher.remember(IDS)
    logits = np.stack([expected_of(name, row.tolist(), model.bare_tokens, sliding=True)[:-1] for row in IDS])
    expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    assert largest(teacher.log_probabilities(IDS).numpy(), expected) <= CLOSE
