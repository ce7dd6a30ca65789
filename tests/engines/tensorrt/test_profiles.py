"""Optimization profiles: every point consistent, within the limits asked for and the model's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.tensorrt.profiles import Limits, profile_shapes
from cushion_deploy.errors import UsageError


@given(
    batch=st.integers(1, 4),
    context=st.integers(1, 300),
    prefill=st.integers(1, 400),
    prefix=st.integers(0, 5),
)
def test_every_point_of_a_profile_is_consistent(batch: int, context: int, prefill: int, prefix: int) -> None:
    contract = GraphContract(2, 3, 8, 32, 256, "float16", prefix)
    limits = Limits.of(CompileOptions(max_batch=batch, max_context=context, max_prefill=prefill), contract)
    assert limits.prefill <= limits.context <= 256 - prefix
    for name, shapes in profile_shapes(contract, limits).items():
        assert set(shapes) == {
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")),
        }
        for point in range(3):
            (rows, sequence), (mask_rows, total) = shapes["input_ids"][point], shapes["attention_mask"][point]
            cache = shapes["past_key_values.1.value"][point]
            assert (cache[0], cache[1], cache[3]) == (rows, 3, 8)
            assert mask_rows == rows
            assert total == sequence + cache[2]
            assert list(shapes["position_ids"][point]) == [rows, sequence]
        for low, usual, high in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
        assert shapes["past_key_values.0.key"][0][2] == 0
        assert shapes["past_key_values.0.key"][2][2] == limits.context - 1
        assert shapes["input_ids"][2] == [batch, 1 if name == "decode" else limits.prefill]


@pytest.mark.parametrize("name", ["max_batch", "max_context", "max_prefill"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    contract = GraphContract(2, 3, 8, 32, 256, "float16", 0)
    with pytest.raises(UsageError, match=f"{name} is 0"):
        Limits.of(CompileOptions(**{name: 0}), contract)  # type: ignore[arg-type]


def test_a_prefix_that_leaves_no_position_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves nothing of 4 positions"):
        Limits.of(CompileOptions(), GraphContract(2, 3, 8, 32, 4, "float16", 4))
