"""Every setting, enumerated from the fields of the recipe: what cannot work is refused before the first stage."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic.fields import FieldInfo

from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.recipe.sections import Section

HUGE = 2**40
"""Beyond every model, and beyond 32 bits; as a decimal fraction for settings that are fractions."""
REFUSED = {
    *("search.max_length", "search.text_tokens", "tuning.window", "calibration.window", "evaluation.window"),
    *("parity.tokens", "parity.decode_tokens", "tensorrt.max_batch"),
}
"""What does not fit: HUGE is a number like any other in a recipe, and refused once the model is known."""
BOUNDED = {
    *("search.bits", "search.tau", "search.average_chats", "smoothing.alpha", "tuning.first_weight"),
    *("tuning.learning_rate", "tuning.scale_learning_rate", "calibration.percentile", "export.opset"),
}
"""What has an upper limit in the recipe itself."""
AT_MOST = {
    *("seed", "compute.memory", "search.random_candidates", "search.screen_tokens", "search.screen_candidates"),
    *("search.gradient_candidates", "search.audit_tokens", "search.average_tokens", "search.batch_positions"),
    *("smoothing.limit", "smoothing.rotate_down", "smoothing.rotate_out", "smoothing.rotate_in"),
    *("tuning.error_weight", "tuning.windows"),
    *("tuning.held_out", "tuning.batch", "tuning.microbatch", "tuning.clip", "tuning.judge_every"),
    *("calibration.windows", "evaluation.max_tokens", "tensorrt.max_context", "tensorrt.max_prefill"),
}
"""What is reduced to what there is, or works as any other number does: a build with all of them HUGE ends well."""
LONG = {"tuning.epochs"}
"""What takes as long as it says."""


def fields() -> dict[str, FieldInfo]:
    """Return every setting by its dotted name, as pydantic knows it."""

    def below(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from below(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return dict(below(Recipe, ""))


def kinds(annotation: Any) -> set[Any]:
    """Return the kinds of values that an annotation admits: types, the values of a Literal, and None."""
    origin = typing.get_origin(annotation)
    if annotation is type(None):
        return {None}
    if origin is typing.Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin is Literal:
        return set(typing.get_args(annotation))
    if origin is tuple:
        return {tuple}
    if origin is not None:
        return set().union(*map(kinds, typing.get_args(annotation)))
    return {annotation}


OTHERS: tuple[Any, ...] = (None, True, 7, -1, 1.5, -0.5, float("nan"), float("inf"), "nonsense", "7", "", [], [7], {})


def unfit(value: Any, allowed: set[Any]) -> bool:
    """Return whether no setting of these kinds may have a value: another type, no number, a negative one, no name."""
    if value is None:
        return None not in allowed
    if isinstance(value, bool):
        return bool not in allowed
    if isinstance(value, (int, float)):
        wanted = {int, float} if isinstance(value, int) else {float}
        return not allowed & wanted or not 0 <= value < float("inf")
    if isinstance(value, str):
        return str not in allowed
    return tuple not in allowed or value != []


@pytest.mark.parametrize("name", fields())
def test_every_setting_refuses_values_of_another_kind(name: str) -> None:
    allowed = kinds(fields()[name].annotation)
    assert allowed & {bool, int, float, str, tuple} or all(isinstance(value, (str, int)) for value in allowed - {None})
    wrong = [value for value in OTHERS if unfit(value, allowed)]
    assert len(wrong) >= 9
    for value in wrong:
        with pytest.raises(UsageError, match=rf"^{re.escape(name)}\b") as e:
            Recipe().merged({name: value})
        assert e.value.hint


def test_every_number_is_known_to_be_limited_reduced_or_harmless() -> None:
    numbers = {name for name, field in fields().items() if kinds(field.annotation) & {int, float, 4}}
    groups = [REFUSED, BOUNDED, AT_MOST, LONG]
    assert set().union(*groups) == numbers
    assert sum(map(len, groups)) == len(numbers), "in one group each"


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_what_is_beyond_the_limit_of_a_recipe_is_refused(name: str) -> None:
    floats = float in kinds(fields()[name].annotation)
    with pytest.raises(UsageError, match=rf"^{re.escape(name)} is "):
        Recipe().merged({name: float(HUGE) if floats else HUGE})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder for all refused builds; the first of them describes the model."""
    return tmp_path_factory.mktemp("work")


def made(work: Path) -> set[str]:
    """Return the finished stages in a work folder."""
    return {path.parent.name for path in (work / "stages").glob("*/*")}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_fits_no_model_is_refused_before_the_first_stage(
    cli: Any, tiny_folder: Path, small: list[str], work: Path, tmp_path: Path, name: str
) -> None:
    settings = [f"{name}={HUGE}", *(["tuning.enabled=true"] if name.startswith("tuning.") else [])]
    options = [argument for setting in settings for argument in ("--set", setting)]
    folders = ["--work-dir", work, "--output", tmp_path / "out"]
    found = cli("build", "--model", tiny_folder, *small, "--engine", "onnxruntime", *options, *folders)
    assert (found.code, all(part in found.err for part in name.split("."))) == (ExitCode.USAGE, True), found.err
    assert str(-HUGE)[:8] not in found.err, "no advice to set a negative number"
    assert made(work) <= {"tokenizer"}
    assert not (tmp_path / "out").exists()


def test_a_build_reduces_what_is_larger_than_what_there_is(
    cli: Any, planted_folder: Path, small: list[str], tmp_path: Path
) -> None:
    floats = {name for name in AT_MOST if float in kinds(fields()[name].annotation)}
    settings = [f"{name}={HUGE}.0" if name in floats else f"{name}={HUGE}" for name in sorted(AT_MOST)]
    settings += ["tuning.enabled=true", "tuning.loss=distill", "tuning.window=32", "tuning.epochs=1"]
    options = [argument for setting in settings for argument in ("--set", setting)]
    folders = ["--work-dir", tmp_path / "work", "--output", tmp_path / "out"]
    found = cli("build", "--model", planted_folder, *small, "--engine", "onnxruntime", *options, *folders)
    assert found.code == ExitCode.OK, found.err
