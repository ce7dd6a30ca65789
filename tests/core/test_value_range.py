"""The type of a plan follows from the largest value; float16 against the measurement is refused by name."""

from __future__ import annotations

import json
import math

import pytest

from cushion_deploy.core.value_range import LargestValue, ValueRange, choose_plan_type
from cushion_deploy.errors import UsageError


def measured(*sizes: float) -> ValueRange:
    rows = tuple(LargestValue(f"layers.{i}.mlp", "residual", size, "dog", 77, 5) for i, size in enumerate(sizes))
    return ValueRange(rows, "text", 100)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((3.0, 1871.0), "float16"),
        ((65_504 / 2, 1.0), "float16"),
        ((32_753.0,), "bfloat16"),
        ((1.0, 98_761.0, 2.0), "bfloat16"),
        ((1.0, math.inf), "bfloat16"),
    ],
)
def test_a_plan_is_float16_if_twice_its_largest_value_fits(sizes: tuple[float, ...], dtype: str) -> None:
    found = choose_plan_type("auto", measured(*sizes))
    assert (found.dtype, found.wanted) == (dtype, "auto")


def test_float16_against_the_measurement_names_token_layer_and_value() -> None:
    with pytest.raises(UsageError, match="float16") as e:
        choose_plan_type("float16", measured(1.0, 98_761.2, 2.0))
    for part in ("the residual stream reaches 98,761 in layers.1.mlp", "token 'dog'", "position 5", "65,504"):
        assert part in e.value.message
    with pytest.raises(UsageError, match="infinity"):
        choose_plan_type("float16", measured(math.inf))


def test_what_is_asked_for_is_taken_where_it_is_no_contradiction() -> None:
    assert choose_plan_type("float16", measured(40_000.0)).dtype == "float16"
    assert choose_plan_type("bfloat16", None).dtype == "bfloat16"
    assert choose_plan_type("float32", measured(1e6)).dtype == "float32"


def test_values_survive_json_and_decide_the_digest() -> None:
    found = measured(1.5, math.inf)
    again = ValueRange.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    assert again.digest == found.digest != measured(1.5, 2.0).digest
