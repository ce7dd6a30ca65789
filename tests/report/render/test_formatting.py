"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.report.render import formatting


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(0.0934, "+9.3 %"), (1.136, "+114 %"), (-0.0236, "−2.4 %"), (0.0006, "+0.06 %"), (-1e-9, "0.00 %"), (0, "0.00 %")],
)
def test_changes_carry_their_sign(ratio: float, shown: str) -> None:
    assert formatting.percent(ratio) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.99993, "0.99993"),
        (2.9e-5, "2.9 × 10⁻⁵"),
        (81234567.0, "81,234,567"),
        (1234.5, "1,234.5"),
        (None, "not finite"),
    ],
)
def test_numbers_keep_their_digits(value: float | None, shown: str) -> None:
    assert formatting.number(value) == shown


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_value_never_looks_like_a_limit_it_misses(value: float, limit: float) -> None:
    shown = formatting.value_and_limit(value, limit)
    assert (shown[0] == shown[1]) == (value == limit)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (125, "2 min 5 s"), (4320, "1 h 12 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert formatting.duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(17, "17 B"), (1500, "1.5 kB"), (207_000_000, "207 MB"), (10**9, "1.0 GB")]
)
def test_sizes(size: int, shown: str) -> None:
    assert formatting.size(size) == shown


@pytest.mark.parametrize("source", ["HuggingFaceTB/SmolLM2-135M", "/models/SmolLM2-135M/", "C:\\m\\SmolLM2-135M"])
def test_a_model_is_called_by_its_last_name(source: str) -> None:
    assert formatting.model_name(source) == "SmolLM2-135M"
