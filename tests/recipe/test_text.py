"""YAML in and out: the types of scalars, what is refused, and the form of the output."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe, Search
from cushion_deploy.recipe.text import parse_yaml

SCALARS: dict[str, Any] = {
    "yes": True,
    "Off": False,
    "y": "y",
    "N": "N",
    "~": None,
    "": None,
    "017": 15,
    "0o17": "0o17",
    "0x1F": 31,
    "1_000": 1000,
    "-_1": "-_1",
    "1:30": 90,
    "1e-1": "1e-1",
    "1.0e-1": 0.1,
    "1.0e5": "1.0e5",
    "1.0e+5": 1e5,
    ".5": 0.5,
    "-.inf": float("-inf"),
    "%YAML 1.2\n---\nyes": True,
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_have_the_types_of_yaml_1_1_as_pyyaml_reads_them(text: str) -> None:
    found = parse_yaml(text)
    assert (type(found), found) == (type(SCALARS[text]), SCALARS[text])
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert yaml.safe_load(text) == found


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.from_regex(
    r"[-+._0-9eExo:yn~]{1,6}", fullmatch=True
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(value=st.recursive(TEXTS | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False), st.lists))
def test_what_pyyaml_wrote_is_read_as_it_was(value: Any) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert parse_yaml(yaml.safe_dump({"k": value})) == {"k": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' is repeated in line 2"),
        ("x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}", "the key 'b' is repeated in line 2"),
        ("? [a]\n: 1", "a key is not text in line 1"),
        ("? {a: 1}\n: 1", "a key is not text in line 1"),
        ("a: [\nb", "in line 2"),
        ("!!bool maybe", "maybe"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("2020-99-99", "month must be in 1..12"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
    ],
)
def test_what_is_refused_is_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as e:
        parse_yaml(text)
    assert "\n" not in str(e.value)


def test_a_merged_key_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def _laughs(levels: int) -> str:
    """Return YAML lines of anchors a0, a1, ..., the last of which holds 10 ** levels leaves."""
    lines = ["model: &a0 [lol]"]
    return "\n".join(lines + [f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels + 1)])


@pytest.mark.parametrize("last", ["", "k: {k: [{s: *a30, s: *a30}]}", "? *a30\n: 1", "seed: *a30"])
def test_exponential_aliases_cost_nothing(last: str, tmp_path: Any) -> None:
    (tmp_path / "r.yaml").write_text(_laughs(30) + "\n" + last)
    with pytest.raises(UsageError) as e:
        Recipe.load(tmp_path / "r.yaml")
    assert len(e.value.message) < 600


def test_the_output_is_ascii_with_one_line_a_value() -> None:
    recipe = Recipe(model="m\u00fc " * 60, search=Search(seed_tokens=("\n", "a: b", "\u2028", "yes"), tau=1e-5))
    text = recipe.to_yaml()
    assert text.isascii()
    assert text.endswith("\n")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert len(lines) == len(list(Recipe.settings())) + 9
    assert "  tau: 1.0e-05" in lines
    assert "revision: null" in lines
    assert "  seed_tokens: [\"\\n\", 'a: b', \"\\L\", 'yes']" in lines
