"""The objective is Eq. 6 over text tokens alone, whatever the batch."""

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
from cushion_deploy.prefix.objective import OBJECTIVES, RowObjective, score_candidates, score_prefix

CANDIDATES = [1, 65, 9, 44, 45, 46, 310]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prefix", [(), (65,), (7, 1, 30)])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_score_of_a_prefix_is_the_numpy_recomputation(
    planted_model: TorchRunner,
    plain_ids: IntArray,
    oracle: Callable[..., Any],
    prefix: tuple[int, ...],
    objective: Any,
    bits: int,
) -> None:
    text = plain_ids[:40]
    past = planted_model.past(planted_model.compute_prefix(prefix))
    expected = oracle(planted_model, prefix, text, bits)[objective]
    assert score_prefix(planted_model, past, text, objective, bits=bits) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prefix", [(), (9,)])
@pytest.mark.parametrize("batch_positions", [1, 70, 10_000])
def test_each_candidate_has_its_own_score_whatever_the_batch(
    planted_model: TorchRunner,
    plain_ids: IntArray,
    oracle: Callable[..., Any],
    prefix: tuple[int, ...],
    objective: Any,
    batch_positions: int,
) -> None:
    text = plain_ids[:30]
    past = planted_model.past(planted_model.compute_prefix(prefix))
    found = score_candidates(planted_model, past, text, CANDIDATES, objective, batch_positions=batch_positions)
    expected = [oracle(planted_model, (*prefix, token), text)[objective] for token in CANDIDATES]
    assert max(expected) > 2 * min(expected), "the candidates differ"
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_positions_of_a_forward_pass_stay_below_the_bound(
    tiny_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = type(tiny_model.module.model).forward

    def count(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        sizes.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(tiny_model.module.model), "forward", count)
    score_candidates(tiny_model, KeysValues(), plain_ids[:19], list(range(10)), "error", batch_positions=64)
    assert sizes == [60, 60, 60, 20]


def test_progress_counts_candidates(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    reports: list[tuple[str, int, int]] = []
    score_candidates(
        tiny_model,
        KeysValues(),
        plain_ids[:9],
        [3, 4, 5],
        "max",
        batch_positions=20,
        progress=lambda *report: reports.append(report),
    )
    assert reports == [("scoring candidates on 9 tokens", 2, 3), ("scoring candidates on 9 tokens", 3, 3)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_in_the_first_layers_only_their_sites_count(
    planted_model: TorchRunner, plain_ids: IntArray, inputs_of: Callable[..., Any], objective: Any, depth: int
) -> None:
    text = plain_ids[:30]
    found = score_candidates(planted_model, KeysValues(), text, CANDIDATES, objective, depth=depth)
    for token, score in zip(CANDIDATES, found, strict=True):
        parts = [x[1:] for site, x in inputs_of(planted_model, (token, *text)).items() if int(site[7]) < depth]
        assert len(parts) == 4 * depth
        if objective == "max":
            expected = max(np.abs(x).max() for x in parts)
        else:
            steps = [np.abs(x).max() / 127 for x in parts]
            expected = sum(((x - np.rint(x / s) * s) ** 2).sum() for x, s in zip(parts, steps, strict=True))
        assert score == pytest.approx(expected, rel=1e-3)
    assert planted_model.module.model.layers[2] is planted_model.layers[2], "the model is whole again"


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-100, 100, width=16)),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
)
def test_rows_are_measured_apart_and_skipped_positions_do_not_count(x: np.ndarray, skip: int, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    measured = {name: RowObjective(name, torch.zeros(3, dtype=torch.float64), skip, bits) for name in OBJECTIVES}
    for objective in measured.values():
        objective(Site("a"), torch.from_numpy(x.copy()))
        objective(Site("b"), torch.from_numpy(x[:, ::-1].copy() * 2))
    error, largest = np.zeros(3), np.zeros(3)
    for part in (x[:, skip:], x[:, ::-1][:, skip:] * 2):
        for row in range(3):
            values = part[row].astype(np.float64)
            amax = np.abs(values).max()
            largest[row] = max(largest[row], amax)
            if amax > 0:
                step = amax / limit
                error[row] += ((values - np.rint(values / step) * step) ** 2).sum()
    np.testing.assert_allclose(measured["max"].totals.numpy(), largest, rtol=1e-6)
    np.testing.assert_allclose(measured["error"].totals.numpy(), error, rtol=1e-3, atol=1e-6)


def test_a_site_of_zeros_adds_nothing() -> None:
    measured = RowObjective("error", torch.zeros(2, dtype=torch.float64), 0)
    measured(Site("a"), torch.zeros(2, 3, 4))
    assert measured.totals.tolist() == [0.0, 0.0]


@pytest.mark.model
def test_a_newline_takes_the_sink_of_smollm2(smollm2: TorchRunner) -> None:
    # METHOD.md section 1: largest linear input 3366 without a prefix, 1281 behind <bos>, 109 behind a newline.
    text = smollm2.encode("The tower is 324 metres tall, about the same height as an 81-storey building. " * 3)
    newline, bos = int(smollm2.encode("\n")[0]), int(smollm2.tokenizer.bos_token_id)
    none = score_prefix(smollm2, KeysValues(), text, "max")
    behind = dict(
        zip((newline, bos), score_candidates(smollm2, KeysValues(), text, [newline, bos], "max"), strict=True)
    )
    assert none > 1000
    assert behind[newline] < 300
