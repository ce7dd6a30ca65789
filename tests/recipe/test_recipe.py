"""The recipe: loading, refusing, merging and printing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Evaluation, Recipe, Search

DEFAULTS: dict[str, Any] = {
    "model": None,
    "revision": None,
    "precision": "w8a8",
    "seed": 0,
    "engines": None,
    "compute": {"device": "auto", "dtype": "auto", "memory": None},
    "search": {
        "enabled": True,
        "ship": "auto",
        "seed_tokens": [],
        "max_length": 4,
        "tau": 0.5,
        "text_tokens": 512,
        "objective": "error",
        "bits": 8,
        "mode": "screen",
        "random_candidates": 128,
        "screen_tokens": 16384,
        "screen_candidates": 64,
        "gradient_candidates": 64,
        "audit_tokens": 16,
        "average_tokens": 512,
        "average_chats": 0.25,
        "batch_positions": 2048,
    },
    "smoothing": {"alpha": 0.5, "limit": 1.5, "rotate_down": 512, "rotate_out": 16, "rotate_in": 16},
    "tuning": {
        "enabled": False,
        "loss": "invisible",
        "first_weight": 0.25,
        "error_weight": 0.01,
        "scales": True,
        "learning_rate": 0.01,
        "scale_learning_rate": 0.003,
        "schedule": "cosine",
        "epochs": 75,
        "windows": 64,
        "held_out": 8,
        "window": 256,
        "batch": 16,
        "microbatch": None,
        "clip": 1.0,
        "judge_every": 20,
        "checkpointing": True,
    },
    "calibration": {"data": None, "estimator": "percentile", "percentile": 99.9995, "windows": 32, "window": None},
    "export": {
        "quantize_head": False,
        "embedding": "auto",
        "keep_float": [],
        "opset": None,
        "prefix": "baked",
        "kv_cache": "float",
        "kv_scales": "per-head",
    },
    "evaluation": {"data": None, "window": None, "max_tokens": None},
    "parity": {"data": None, "tokens": 256, "decode_tokens": 16},
    "tensorrt": {"dtype": "auto", "max_batch": 1, "max_context": 2048, "max_prefill": 512},
}


def _load(text: str | bytes) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Recipe.load(path)


def test_the_defaults_are_those_that_are_documented() -> None:
    assert Recipe().model_dump(mode="json") == DEFAULTS
    assert YAML(typ="safe").load(Recipe().to_yaml()) == DEFAULTS


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "search:\nparity:\n"])
def test_what_is_left_out_has_its_default(text: str) -> None:
    assert _load(text) == Recipe()


def test_values_arrive_where_they_belong() -> None:
    recipe = _load('model: m.gguf\nengines: [onnxruntime]\nsearch: {seed_tokens: ["\\n", <bos>], tau: 1}\n')
    assert recipe.model == "m.gguf"
    assert recipe.engines == ("onnxruntime",)
    assert recipe.search.seed_tokens == ("\n", "<bos>")
    assert recipe.search.tau == 1.0
    assert recipe.search.max_length == 4


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    model=st.none() | TEXTS,
    tokens=st.lists(TEXTS, max_size=3),
    engines=st.none() | st.lists(TEXTS, max_size=2),
    tau=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64),
    enabled=st.booleans(),
)
def test_yaml_round_trip_is_equal(
    model: str | None, tokens: list[str], engines: list[str] | None, tau: float, seed: int, enabled: bool
) -> None:
    recipe = Recipe(
        model=model,
        seed=seed,
        engines=None if engines is None else tuple(engines),
        search=Search(seed_tokens=tuple(tokens), tau=tau, enabled=enabled),
        evaluation=Evaluation(data=model),
    )
    assert _load(recipe.to_yaml()) == recipe


def test_yaml_carries_the_meaning_of_every_setting() -> None:
    lines = Recipe().to_yaml().splitlines()
    for setting in Recipe.settings():
        key = setting.name.rpartition(".")[2]
        place = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert any(lines[i - 1].strip() == f"# {setting.description}" for i in place), setting.name
        assert setting.description.endswith(".")


def test_settings_lists_every_leaf_with_its_default() -> None:
    leaves = {}
    for name, value in DEFAULTS.items():
        leaves.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    found = {s.name: list(s.default) if isinstance(s.default, tuple) else s.default for s in Recipe.settings()}
    assert found == leaves


BAD = {
    "search: {max_lenght: 3}": ("unknown setting 'search.max_lenght'", "did you mean 'search.max_length'?"),
    "precison: w8a8": ("unknown setting 'precison'", "did you mean 'precision'?"),
    "serach: {}": ("unknown setting 'serach'", "did you mean 'search'?"),
    "tau: 0.5": ("unknown setting 'tau'", "did you mean 'search.tau'?"),
    "zzz: 1": ("unknown setting 'zzz'", "choose one of: model, revision"),
    "precision: w4a4": ("unknown precision 'w4a4'", "choose one of: w8a8"),
    "seed: -1": ("seed is -1", "greater than or equal to 0"),
    "seed: yes": ("seed is True", "valid integer"),
    "seed: '4'": ("seed is '4'", "valid integer"),
    "seed: 1.0": ("seed is 1.0", "valid integer"),
    "search: {tau: 0}": ("search.tau is 0", "greater than 0"),
    "search: {tau: 1.1}": ("search.tau is 1.1", "less than or equal to 1"),
    "search: {tau: .nan}": ("search.tau is nan", "finite"),
    "search: {tau: 1e-1}": ("search.tau is '1e-1'", "write 0.1 or 1.0e-1"),
    "search: {text_tokens: 15}": ("search.text_tokens is 15", "greater than or equal to 16"),
    "search: {max_length: -1, tau: 2}": ("the first of 2 problems", "greater than or equal to 0"),
    "search: {enabled: 1}": ("search.enabled is 1", "valid boolean"),
    "search: on": ("search is True", "a mapping of settings"),
    "calibration: {percentile: 89}": ("calibration.percentile is 89", "greater than or equal to 90"),
    "calibration: {estimator: average}": ("calibration.estimator is 'average'", "'max', 'percentile' or 'mse'"),
    "compute: {device: gpu}": ("unknown device 'gpu'", "choose one of: auto, cpu, cuda, cuda:N, mps"),
    "compute: {dtype: int8}": ("compute.dtype is 'int8'", "'bfloat16'"),
    "compute: {memory: -1}": ("compute.memory is -1", "greater than or equal to 0"),
    "engines: onnxruntime": ("engines is 'onnxruntime'", "a list of strings"),
    "engines: [1]": ("engines.0 is 1", "valid string"),
    "evaluation: {window: 512, max_tokens: 100}": ("max_tokens 100 is less than one window of 512", "--print-config"),
    "1: 2": ("1 is 1", "a string as key"),
    "- a": ("contains a list", "--print-config"),
    "just words": ("contains a str", "--print-config"),
    "a: [": ("not valid YAML", "--print-config"),
    "seed: 1\nseed: 2": ("the key 'seed' is repeated in line 2", "--print-config"),
    "search: {tau: 0.5, tau: 0.6}": ("the key 'tau' is repeated in line 1", "--print-config"),
    "model: !!python/object/apply:os.getcwd []": ("not valid YAML", "--print-config"),
    "&a [*a]": ("contains a list", "--print-config"),
    "{? [a] : 1}": ("not valid YAML", "--print-config"),
    "[" * 1200: ("not valid YAML", "--print-config"),
}


@pytest.mark.parametrize("text", BAD, ids=lambda t: t[:40])
def test_a_bad_recipe_is_refused_in_two_clear_lines(text: str) -> None:
    with pytest.raises(UsageError) as e:
        _load(text)
    message, hint = BAD[text]
    assert message in e.value.message
    assert hint in e.value.hint
    for line in (e.value.message, e.value.hint):
        assert "\n" not in line
        assert "pydantic" not in line
        assert len(line) < 600


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"\xff\xfe\xfa", "is UTF-16 text"),
        (b"\x00", "not valid YAML"),
        (b"model: \xc3", "not UTF-8 text: byte 0xc3 at offset 7"),
    ],
)
def test_bytes_that_are_no_text_are_refused(raw: bytes, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        _load(raw)


def test_a_byte_order_mark_is_no_part_of_a_recipe() -> None:
    assert _load(b"\xef\xbb\xbfseed: 7\n").seed == 7


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read the recipe") as e:
            Recipe.load(path)
        assert str(path) in e.value.message
    with open(tmp_path / "model.gguf", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        Recipe.load(tmp_path / "model.gguf")


def test_merged_overrides_what_is_given_only() -> None:
    base = Recipe(seed=3, search=Search(tau=0.25))
    merged = base.merged({"search.max_length": 0, "search.enabled": False, "model": "m", "engines": ("a",)})
    expected = base.model_dump()
    expected["search"].update(max_length=0, enabled=False)
    expected.update(model="m", engines=("a",))
    assert merged.model_dump() == expected
    assert base == Recipe(seed=3, search=Search(tau=0.25))
    assert base.merged({}) == base


def test_merged_sets_null_where_null_is_given() -> None:
    merged = Recipe(model="m", engines=("a",)).merged({"engines": None, "calibration.data": None})
    assert (merged.model, merged.engines, merged.calibration.data) == ("m", None, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("search.tau", None, "search.tau is null"),
        ("precision", None, "precision is null"),
        ("search.seed_tokens", None, "search.seed_tokens is null"),
        ("tensorrt.max_batch", 0, "tensorrt.max_batch is 0"),
        ("search.max_lenght", 1, "unknown setting 'search.max_lenght'"),
        ("search.max_lenght", None, "unknown setting 'search.max_lenght'"),
        ("search", {}, "'search' is a section"),
        ("search.tau", 2.0, "search.tau is 2.0"),
        ("precision", "w4a4", "unknown precision 'w4a4'"),
        ("seed.x", 1, "unknown setting 'seed.x'"),
    ],
)
def test_merged_checks_like_load(name: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as e:
        Recipe().merged({name: value})
    assert message in e.value.message


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().search.tau = 0.1


def test_a_bundle_from_before_rotations_has_none() -> None:
    old = Recipe.from_bundle({"smoothing": {"alpha": 0.5, "limit": 1.5}})
    assert not old.smoothing.rotates
    new = Recipe.from_bundle({"smoothing": {"alpha": 0.5, "rotate_down": 64}})
    assert (new.smoothing.rotate_down, new.smoothing.rotate_out, new.smoothing.rotate_in) == (64, 0, 0)
