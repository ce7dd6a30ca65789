"""The floor is the objective of a text without its sinks, and a search stops where it is far above tau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix import search
from cushion_deploy.prefix.floor import cannot_pay, floor_of
from cushion_deploy.prefix.objective import OBJECTIVES, score_prefix
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.recipe import Search

Inputs = Callable[..., dict[str, np.ndarray]]


def config(**changes: Any) -> Search:
    return Search(**{"text_tokens": 48, "random_candidates": 8, "screen_candidates": 8, "audit_tokens": 0, **changes})


def numpy_floor(inputs: dict[str, np.ndarray], objective: str, bits: int = 8) -> tuple[float, int]:
    """Return the floor from the Site inputs ``[text, features]``, and the number of sinks."""
    sizes = np.stack([np.abs(x).max(axis=1) for x in inputs.values()])
    # torch takes the lower of two middle values as the median.
    usual = np.sort(sizes, axis=1)[:, (sizes.shape[1] - 1) // 2]
    sinks = (sizes >= 5 * usual[:, None]).any(axis=0)

    def measure(kept: np.ndarray) -> float:
        parts = [x[kept] for x in inputs.values()]
        if objective == "max":
            return max(float(np.abs(x).max()) for x in parts)
        steps = [np.abs(x).max() / (2 ** (bits - 1) - 1) for x in parts]
        return float(sum(((x - np.rint(x / s) * s) ** 2).sum() for x, s in zip(parts, steps, strict=True)))

    return measure(~sinks) / measure(np.ones_like(sinks)), int(sinks.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("start", "bits"), [(0, 8), (150, 8), (300, 8), (150, 4)])
def test_the_floor_is_that_of_numpy(
    planted_model: TorchRunner, plain_ids: IntArray, inputs_of: Inputs, objective: Any, start: int, bits: int
) -> None:
    text = plain_ids[start : start + 48]
    expected, sinks = numpy_floor(inputs_of(planted_model, text), objective, bits)
    assert sinks > 0
    before = score_prefix(planted_model, KeysValues(), text, objective, bits=bits)
    found = floor_of(planted_model, KeysValues(), text, objective, before, bits=bits)
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected < 0.3


def test_the_prefix_is_no_part_of_it(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, inputs_of: Inputs
) -> None:
    # The absorber is itself the strongest sink of all; behind it no token of the text is one.
    text, tokens = plain_ids[:48], plant.absorbers[:1]
    past = planted_model.past(planted_model.compute_prefix(tokens))
    inputs = {site: x[1:] for site, x in inputs_of(planted_model, (*tokens, *text)).items()}
    assert numpy_floor(inputs, "error") == (1.0, 0)
    assert floor_of(planted_model, past, text, "error", score_prefix(planted_model, past, text, "error")) == 1.0


def test_a_text_of_nothing_but_sinks_leaves_nothing(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cushion_deploy.prefix.floor.WEAK_SINK", 0.0)
    assert floor_of(planted_model, KeysValues(), plain_ids[:48], "error", 1.0) == 0.0


@pytest.mark.parametrize(("floor", "tau", "expected"), [(0.62, 0.5, False), (0.63, 0.5, True), (1.0, 0.8, False)])
def test_only_what_is_a_quarter_above_tau_cannot_pay(floor: float, tau: float, expected: bool) -> None:
    assert cannot_pay(floor, tau) is expected


def test_a_model_without_sink_is_not_screened(
    tiny_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("self_sink_sizes", "gradient_changes", "score_candidates"):
        monkeypatch.delattr(search, name)
    prefix, trace = PrefixSearch(tiny_model, plain_ids, config()).run()
    assert (prefix.length, trace.steps, trace.positions_full_scan) == (0, [], 0)
    assert trace.positions_scored == 3 * 48
    assert "1.00 of the objective remains without the attention sinks" in trace.stopped
    assert trace.stopped.endswith("this model has no sink worth a prefix")


def test_the_search_takes_the_floor_for_its_own_bits(
    planted_model: TorchRunner, plain_ids: IntArray, inputs_of: Inputs
) -> None:
    text = plain_ids[:48]
    _, trace = PrefixSearch(planted_model, text, config(bits=4, tau=0.01)).run()
    found = {bits: f"{numpy_floor(inputs_of(planted_model, text), 'error', bits)[0]:.2f}" for bits in (4, 8)}
    assert found[4] != found[8]
    assert trace.stopped.startswith(f"{found[4]} of the objective remains")


def test_the_skipped_step_would_have_found_nothing(
    tiny_model: TorchRunner, planted_model: TorchRunner, plain_ids: IntArray
) -> None:
    # The exhaustive search never skips, and its scores are exact: both must find the same prefix.
    for model in (tiny_model, planted_model):
        for seed in range(3):
            settings = {"max_length": 3, "screen_candidates": 320}
            screened, trace = PrefixSearch(model, plain_ids, config(**settings), seed).run()
            scanned, whole = PrefixSearch(model, plain_ids, config(**settings, mode="exhaustive"), seed).run()
            assert screened.length == scanned.length
            assert len(trace.steps) == len(whole.steps) - 1, "the last step of the scan is the one that is skipped"
            assert not whole.steps[-1].accepted


def test_tau_decides_whether_a_step_is_skipped(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    _, trace = PrefixSearch(tiny_model, plain_ids, config(tau=0.8, max_length=1)).run()
    assert len(trace.steps) == 1
