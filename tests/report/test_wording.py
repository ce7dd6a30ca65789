"""Numbers and tokens as people read them."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.report import wording


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", "⏎"),
        (" the", "␣the"),
        ("\t\r", "⇥‹U+000D›"),
        ("\x1b[31m", "‹U+001B›[31m"),
        ("\u202eevil", "‹U+202E›evil"),
        ("<|im_start|>", "<|im_start|>"),
        ("", "(empty)"),
        ("naïve 東京", "naïve␣東京"),
    ],
)
def test_tokens_are_shown_with_nothing_invisible(token: str, shown: str) -> None:
    assert wording.visible(token) == shown


@settings(max_examples=40)
@given(st.text(max_size=20))
def test_no_control_or_direction_character_survives(text: str) -> None:
    for shown in (wording.visible(text), wording.one_line(text), wording.legible(text).replace("\n", "")):
        assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_a_symbol_of_the_vocabulary_is_told_apart_from_a_stand_in() -> None:
    assert wording.token_pieces("⏎") != wording.token_pieces("\n")


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(0.0934, "+9.3 %"), (1.136, "+114 %"), (-0.0236, "−2.4 %"), (0.0006, "+0.06 %"), (-1e-9, "0.00 %"), (0, "0.00 %")],
)
def test_changes_carry_their_sign(ratio: float, shown: str) -> None:
    assert wording.percent(ratio) == shown


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
    assert wording.number(value) == shown


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_value_never_looks_like_a_limit_it_misses(value: float, limit: float) -> None:
    shown = wording.value_and_limit(value, limit)
    assert (shown[0] == shown[1]) == (value == limit)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (125, "2 min 5 s"), (4320, "1 h 12 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert wording.duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(17, "17 B"), (1500, "1.5 kB"), (207_000_000, "207 MB"), (10**9, "1.0 GB")]
)
def test_sizes(size: int, shown: str) -> None:
    assert wording.size(size) == shown


@pytest.mark.parametrize("source", ["HuggingFaceTB/SmolLM2-135M", "/models/SmolLM2-135M/", "C:\\m\\SmolLM2-135M"])
def test_a_model_is_called_by_its_last_name(source: str) -> None:
    assert wording.model_name(source) == "SmolLM2-135M"
