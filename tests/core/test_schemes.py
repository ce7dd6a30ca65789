"""Every composition has one name that reads back, presets are the paper's settings, and mistakes list what there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.core.schemes import PRECISIONS, PRESETS, QuantScheme, canonical_name, describe, parse_scheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError

FIELDS = st.fixed_dictionaries(
    {
        "weight_bits": st.sampled_from([8, 6, 4]),
        "activation_bits": st.sampled_from([8, 6, 4]),
        "activations": st.sampled_from(["static", "dynamic", "per-token"]),
        "symmetric": st.booleans(),
        "weight_group": st.integers(0, 999_999),
        "smoothing": st.booleans(),
    }
)


@settings(deadline=None, derandomize=True)
@given(FIELDS, st.booleans())
def test_every_scheme_has_a_name_that_reads_back(fields: dict[str, object], head: bool) -> None:
    scheme = QuantScheme("?", quantize_head=head, **fields)  # type: ignore[arg-type]
    name = canonical_name(scheme)
    again = parse_scheme(name, quantize_head=head)
    assert again.name == name
    assert again == QuantScheme(name, quantize_head=head, **fields)  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True)
@given(FIELDS)
def test_nobody_can_take_the_name_of_another_scheme_for_a_deployable_one(fields: dict[str, object]) -> None:
    scheme = QuantScheme("?", **fields)  # type: ignore[arg-type]
    deployable = (
        (scheme.weight_bits, scheme.activation_bits, scheme.weight_group) == (8, 8, 0)
        and scheme.activations == "static"
        and scheme.symmetric
    )
    assert (canonical_name(scheme) in ("w8a8", "w8a8-smooth")) is deployable
    assert describe(scheme).endswith("(deployable)") is deployable
    assert ("evaluation only" in describe(scheme)) is not deployable


@pytest.mark.parametrize("words", list(itertools.permutations(["per-token", "asym", "g64", "smooth"])))
def test_words_may_come_in_any_order(words: tuple[str, ...]) -> None:
    scheme = parse_scheme("-".join(["w6a4", *words]))
    assert scheme.name == "w6a4-per-token-asym-g64-smooth"
    assert (scheme.weight_bits, scheme.activation_bits, scheme.activations) == (6, 4, "per-token")
    assert (scheme.symmetric, scheme.weight_group, scheme.smoothing) == (False, 64, True)


def test_static_is_what_a_name_without_granularity_means() -> None:
    assert parse_scheme("w8a8-static") == parse_scheme("w8a8") == QuantScheme()
    assert parse_scheme("w8a8-asym").name == "w8a8-static-asym"
    assert parse_scheme("w4a4").name == "w4a4-static"


def test_deployable_precisions_go_by_the_names_of_the_grammar() -> None:
    for name, scheme in PRECISIONS.items():
        assert parse_scheme(name) == scheme
        assert scheme.deployable


@pytest.mark.parametrize(
    ("preset", "bits", "activations", "smoothing"),
    [
        ("naive-o1", 8, "per-token", False),
        ("naive-o2", 8, "dynamic", False),
        ("naive-o3", 8, "static", False),
        ("smoothquant-o1", 8, "per-token", True),
        ("smoothquant-o2", 8, "dynamic", True),
        ("smoothquant-o3", 8, "static", True),
        ("naive-w6a6", 6, "per-token", False),
        ("naive-w4a4", 4, "per-token", False),
        ("smoothquant-w6a6", 6, "per-token", True),
        ("smoothquant-w4a4", 4, "per-token", True),
    ],
)
def test_presets_are_the_settings_of_the_papers_tables(
    preset: str, bits: int, activations: str, smoothing: bool
) -> None:
    scheme = parse_scheme(preset)
    assert (scheme.weight_bits, scheme.activation_bits) == (bits, bits)
    assert (scheme.activations, scheme.smoothing) == (activations, smoothing)
    assert (scheme.symmetric, scheme.weight_group) == (False, 128)
    assert not scheme.deployable
    assert scheme.name == PRESETS[preset]
    assert parse_scheme(scheme.name) == scheme


def test_there_are_no_other_presets() -> None:
    assert len(PRESETS) == 10


@pytest.mark.parametrize(
    ("name", "found", "valid"),
    [
        ("w3a3", "'w3a3'", ["w8a8", "w4a4", "naive-o1", "smoothquant-o3"]),
        ("", "''", ["w8a8"]),
        ("W8A8", "'W8A8'", ["w8a8"]),
        ("naive-o9", "'naive-o9'", ["naive-o1"]),
        ("w8a8-fast", "'fast'", ["static", "dynamic", "per-token", "asym", "g<size>", "smooth"]),
        ("w8a8-", "''", ["per-token"]),
        ("w8a8--asym", "''", ["per-token"]),
        ("w8a8-token", "'token'", ["per-token"]),
        ("w8a8-static-token", "'static-token'", ["per-token"]),
        ("w8a8-g0", "'g0'", ["g<size>"]),
        ("w8a8-g", "'g'", ["g<size>"]),
        ("w8a8-g-128", "'g'", ["g<size>"]),
        ("w8a8-per-token\n", "'per-token\n'", ["per-token"]),
    ],
)
def test_an_unknown_word_lists_the_valid_ones(name: str, found: str, valid: list[str]) -> None:
    with pytest.raises(UsageError) as e:
        parse_scheme(name)
    assert found in e.value.message
    assert all(word in e.value.hint for word in valid)


@pytest.mark.parametrize("name", ["w8a8-static-dynamic", "w8a8-asym-asym", "w8a8-g64-g128", "w8a8-smooth-asym-smooth"])
def test_saying_a_thing_twice_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="twice") as e:
        parse_scheme(name)
    assert name.rpartition("-")[2] in e.value.hint


def test_a_description_says_all_that_a_name_leaves_out() -> None:
    kept = (Site("layers.0.mlp.down"), Site("layers.1.mlp.down"))
    assert describe(QuantScheme(quantize_head=False, float_sites=kept)) == (
        "8-bit activations, per-tensor static, symmetric; 8-bit weights, symmetric, one scale per output channel; "
        "head in floating point; 2 Sites in floating point (deployable)"
    )
    text = describe(parse_scheme("smoothquant-w4a4"))
    for words in ("4-bit activations, per-token dynamic, asymmetric", "group of 128", "SmoothQuant", "zero point"):
        assert words in text
