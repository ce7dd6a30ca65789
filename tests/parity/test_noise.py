"""The rounding noise of a model, against numpy and against the model in float64, and limits that follow it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.parity.blame import SiteInputs
from cushion_deploy.parity.ladder import decode_rung, float_rung
from cushion_deploy.parity.limits import NOISE
from cushion_deploy.parity.noise import Float64Arithmetic, float_noise
from cushion_deploy.parity.reference import float_inputs
from cushion_deploy.recipe import Compute


def test_operators_run_in_float64_and_casts_to_fewer_bits_do_not_narrow() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 257)).astype(np.float32), rng.normal(size=(257, 257)).astype(np.float32)
    with Float64Arithmetic():  # type: ignore[no-untyped-call]
        scores = functional.linear(torch.from_numpy(x), torch.from_numpy(w)).to(torch.float32)
        found = functional.softmax(torch.cat([scores, scores.to(torch.bfloat16)]), dim=-1, dtype=torch.float32).numpy()
    product = x.astype(np.float64) @ w.astype(np.float64).T
    expected = np.exp(product - product.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), rtol=1e-12)


def test_integers_stay_integers() -> None:
    with Float64Arithmetic():  # type: ignore[no-untyped-call]
        assert torch.arange(3).dtype == torch.int64
        assert (torch.ones(3, dtype=torch.int8) * 2).dtype == torch.int8


def test_a_model_that_does_not_fit_into_memory_has_the_same_noise(planted_folder: Path, plain_ids: Any) -> None:
    source = resolve_source(str(planted_folder))
    whole, streamed = (load_folder(planted_folder, source, compute=Compute(memory=memory)) for memory in (None, 0))
    assert streamed.placed.streamed_layers
    found = [float_noise(model, model.no_prefix(), plain_ids[None, :64]) for model in (whole, streamed)]
    assert found[0] == found[1] > 0


def test_the_noise_is_the_distance_to_the_model_in_float64(deployed) -> None:
    ids, prefix = deployed.reference.ids, deployed.prefix
    double = deployed.model.transformer.double()
    try:
        past = [(torch.from_numpy(k)[None].double(), torch.from_numpy(v)[None].double())
                for k, v in zip(prefix.keys, prefix.values, strict=True)]  # fmt: skip
        logits = _logits(double, torch.from_numpy(ids), past)
    finally:
        deployed.model.transformer.float()
    apart = np.abs(logits - deployed.reference.float_logits).max()
    # transformers computes norms and the softmax of a float64 model in float32, so this reference has noise too.
    assert deployed.reference.noise == pytest.approx(apart, rel=0.5)
    assert 1e-7 < deployed.reference.noise < 1e-4


def _logits(module: torch.nn.Module, ids: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    with torch.inference_mode():
        return np.asarray(module(ids, past_key_values=cache).logits.numpy())


def test_the_noise_is_not_below_the_resolution_of_the_largest_logit(deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Float64Arithmetic, "__torch_dispatch__", lambda self, f, t, a=(), k=None: f(*a, **(k or {})))
    largest = np.abs(deployed.reference.float_logits).max()
    assert float_noise(deployed.model, deployed.prefix, deployed.reference.ids) == pytest.approx(largest * 2.0**-23)


def test_float_logits_are_compared_within_a_multiple_of_the_noise_and_both_are_shown(deployed) -> None:
    def inputs() -> SiteInputs:
        return float_inputs(deployed.model, deployed.prefix, deployed.reference.ids)

    distance = float_rung(deployed.reference, deployed.twin, inputs)[0].value
    for noise, passes in ((distance / NOISE * 1.01, True), (distance / NOISE * 0.99, False)):
        reference = dataclasses.replace(deployed.reference, noise=noise)
        check = float_rung(reference, deployed.twin, inputs)[0]
        assert check.passed is passes
        assert check.limit == pytest.approx(NOISE * noise)
        assert f"{NOISE} times the rounding noise of the model, {noise:.2g}" in check.note
    session = open_session(deployed.twin)
    assert decode_rung("decode", deployed.reference, session, 4)[0].limit == NOISE * deployed.reference.noise


def test_a_tie_within_the_noise_may_be_broken_either_way(deployed) -> None:
    top = np.sort(deployed.reference.float_logits[0], axis=-1)[:, -2:]
    margins = np.sort(top[:, 1] - top[:, 0])
    noise = float((margins[2] + margins[3]) / 2 / (2 * NOISE))
    reference = dataclasses.replace(deployed.reference, noise=noise)
    check = float_rung(reference, deployed.twin, dict)[1]
    assert check.limit == pytest.approx(1 - 3 / len(margins))
    assert "are ties within the noise" in check.note


def test_the_cpu_measures_the_noise_of_a_device_without_float64(deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps: a float32 model that must not see a number of 64 bits unless it was moved to the CPU."""
    placed, moved = deployed.model.placed, []
    on_cpu = placed.on_cpu

    @contextmanager
    def noted() -> Iterator[None]:
        moved.append(placed.device)
        with on_cpu():
            yield

    monkeypatch.setattr(TorchRunner, "wide", torch.float32)
    monkeypatch.setattr(placed, "on_cpu", noted)
    found = float_noise(deployed.model, deployed.prefix, deployed.reference.ids)
    assert found == deployed.reference.noise
    assert len(moved) == 1
