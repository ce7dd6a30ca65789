"""Text from a model is displayed with nothing invisible left in it."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy import printable


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
    assert printable.visible(token) == shown


@settings(max_examples=40)
@given(st.text(max_size=20))
def test_no_control_or_direction_character_survives(text: str) -> None:
    for shown in (printable.visible(text), printable.one_line(text), printable.legible(text).replace("\n", "")):
        assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n\x1b]0;x\x07\r", "a\tb\n‹U+001B›]0;x‹U+0007›‹U+000D›"),
        ("\x9b2J\x7f", "‹U+009B›2J‹U+007F›"),
        ("\u061c\u200e\u200f\u202a\u202e\u2066\u2069", "‹U+061C›‹U+200E›‹U+200F›‹U+202A›‹U+202E›‹U+2066›‹U+2069›"),
        ("\udc80", "‹U+DC80›"),
        ("\u0645\u06cc\u200c 👨\u200d👩 \u00a0é", "\u0645\u06cc\u200c 👨\u200d👩 \u00a0é"),
    ],
)
def test_controls_are_visible_and_joiners_stay(text: str, shown: str) -> None:
    assert printable.controls_visible(text) == shown


def test_a_symbol_of_the_vocabulary_is_told_apart_from_a_stand_in() -> None:
    assert printable.token_pieces("⏎") != printable.token_pieces("\n")
