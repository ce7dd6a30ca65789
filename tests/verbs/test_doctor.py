"""The doctor sees a planted sink where it is, sees none where there is none, and says what a build needs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.cli.main import run
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sinks import SINK_RATIO, find_sinks
from cushion_deploy.recipe import ROTATIONS, Recipe
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.resources import Resources
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.verbs.doctor import Diagnosis, diagnose, estimate_build

Look = Callable[..., Diagnosis]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of text in which no absorber of the planted model stands."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone. " * 20)
    return file


@pytest.fixture
def pipeline(text: Path) -> Callable[..., Pipeline]:
    """Return a function that makes the pipeline of a model."""

    def make(model: Path, **more: object) -> Pipeline:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        return Pipeline.of(Recipe().merged({"model": str(model), "calibration.data": str(text), **changes}))

    return make


@pytest.fixture
def look(pipeline: Callable[..., Pipeline], tmp_path: Path) -> Look:
    """Return a function that looks at a model."""
    return lambda model, **more: diagnose(pipeline(model, **more), Run(StageStore(tmp_path / "work")))


def test_a_planted_sink_is_seen_where_it_is(planted_model: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    windows = plain_ids[:192].reshape(4, 48)
    sinks, sites = find_sinks(planted_model, windows)
    inputs: list[torch.Tensor] = []
    linear = planted_model.module.model.layers[plant.layer].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        planted_model.module(input_ids=torch.from_numpy(windows))
    handle.remove()
    sizes = inputs[0].abs().amax(-1)
    ratios = sizes / sizes.median()
    assert sinks[0].site == f"layers.{plant.layer}.mlp.down" == sites[0][0]
    assert sinks[0].times_median == pytest.approx(float(ratios.max()), rel=1e-5)
    first = next(sink for sink in sinks if sink.position == 0)
    assert first.share == 1.0
    assert first.magnitude == pytest.approx(float(sizes[:, 0].max()), rel=1e-5)
    assert {sink.position for sink in sinks} == set(np.flatnonzero((ratios.numpy() >= SINK_RATIO).any(0)).tolist())


def test_the_doctor_needs_no_onnxruntime(planted_folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert look(planted_folder).sinks


def test_a_model_with_a_sink_is_told_to_take_a_prefix(planted_folder: Path, look: Look) -> None:
    found = look(planted_folder)
    assert found.sinks
    assert found.prefix_pays
    assert found.relief < 0.5
    assert found.damage.plain.quantized != found.damage.plain.fp
    assert found.damage.steps[0].remedy.startswith("the prefix ")


def test_a_recipe_without_a_prefix_is_told_what_it_forgoes(planted_folder: Path, look: Look) -> None:
    found = look(planted_folder, search__enabled=False)
    assert found.prefix_pays
    assert not found.prefix_allowed
    assert any("the recipe disables it" in warning for warning in found.warnings)
    assert not any("the recipe disables it" in w for w in look(planted_folder).warnings)


def test_a_model_without_a_sink_needs_no_prefix(tiny_folder: Path, look: Look) -> None:
    found = look(tiny_folder)
    assert found.sinks == ()
    assert found.sites == ()
    assert not found.prefix_pays
    assert abs(found.damage.plain.change) < 0.1
    assert not found.damage.plain.costly
    assert not any(step.remedy.startswith("the prefix") for step in found.damage.steps)


def test_the_estimate_follows_the_recipe(
    tiny_folder: Path, pipeline: Callable[..., Pipeline], tiny_model: TorchRunner, plain_ids: IntArray, tmp_path: Path
) -> None:
    windows, run = plain_ids[:192].reshape(4, 48), Run(StageStore(tmp_path / "work"))

    def estimate(**changes: object) -> Resources:
        return estimate_build(pipeline(tiny_folder, **changes), run, windows)

    def stages(**changes: object) -> set[str]:
        return set(estimate(**changes).seconds)

    usual = {"load", "search", "choose", "smooth", "calibrate", "embedding", "export", "value-range", "engine"}
    usual |= {"evaluate", "parity"}
    assert stages() == usual
    assert stages(tuning__enabled=True) == {*usual, "tune"}
    assert stages(search__enabled=False, tuning__enabled=True) == usual - {"search", "choose"}
    short, long = (estimate(tuning__enabled=True, tuning__epochs=epochs).seconds["tune"] for epochs in (10, 80))
    assert 1 < long / short < 16  # both are measured, on whatever else the machine does
    # Without checkpointing every layer keeps its activations: of 16 windows of 200 tokens more than all else.
    large = {"tuning__enabled": True, "tuning__window": 200, "tuning__microbatch": 16}
    kept, again = (estimate(**large, tuning__checkpointing=more).memory for more in (False, True))
    states = 16 * 200 * (tiny_model.spec.intermediate_size + 2 * tiny_model.spec.hidden_size) * 4
    assert kept - again > states
    found = estimate()
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in found.seconds.values())
    assert found.memory > 4 * tiny_model.spec.parameters
    assert found.disk > 4 * tiny_model.spec.parameters
    assert found.disk_free > 0


def test_too_little_text_is_refused(tiny_folder: Path, look: Look, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("no")
    with pytest.raises(UsageError, match="too few to examine"):
        look(tiny_folder, calibration__data=str(tmp_path / "short.txt"))


@pytest.mark.parametrize("planted", [True, False])
def test_the_command_says_it_in_words_and_in_json(
    planted: bool, planted_folder: Path, tiny_folder: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    model = planted_folder if planted else tiny_folder
    line = ["doctor", str(model), "--calib-data", str(text), "--work-dir", str(tmp_path / "work"), "--quiet"]
    assert run(line) == 0
    words = capsys.readouterr().out
    assert ("a prefix pays" if planted else "no prefix is needed") in words
    assert "without remedies" in words
    assert "KL  from position 16" in words
    assert "(as a build makes it)" in words
    assert ("mostly because of mlp.down" if planted else "stays close to the original model even without") in words
    assert "a build takes about" in words
    assert "onnxruntime" in words
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prefix_pays"] is planted
    assert bool(found["sinks"]) is planted
    assert found["cost"]["change"] == pytest.approx(found["cost"]["quantized"] / found["cost"]["fp"] - 1)
    remedies = [step["remedy"] for step in found["damage"]["steps"]]
    assert remedies[-2:] == ["SmoothQuant", "the rotation"]
    assert found["damage"]["steps"][-1]["divergence"] == found["default_cost"]["divergence"]
    assert set(found["damage"]["kinds"]) == {"attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"}
    assert len(found["damage"]["worst_sites"]) == 3
    assert {engine["name"] for engine in found["engines"]} >= {"onnxruntime", "tensorrt-rtx"}


def test_a_model_that_is_not_there_is_a_clear_error(capsys: Any, tmp_path: Path) -> None:
    assert run(["doctor", str(tmp_path / "nothing"), "--quiet", "--work-dir", str(tmp_path / "work")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_sink_that_no_common_token_replaces_is_not_called_none(
    planted_folder: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    line = ["doctor", str(planted_folder), "--calib-data", str(text), "--work-dir", str(tmp_path / "work"), "--quiet"]
    assert run([*line, "--set", "search.tau=0.0001"]) == 0
    words = capsys.readouterr().out
    assert "no common token takes the sinks' place" in words
    assert "no prefix is needed" not in words
    assert "no sink is to blame" not in words


def test_a_model_without_sinks_that_is_damaged_is_told_what_helps(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cushion_deploy.verbs.trial.COSTLY", 1e-9)
    line = ["doctor", str(tiny_folder), "--calib-data", str(text), "--work-dir", str(tmp_path / "work"), "--quiet"]
    off = [word for name in ROTATIONS for word in ("--set", f"smoothing.{name}=0")]
    assert run([*line, *off]) == 0
    words = capsys.readouterr().out
    assert "no attention sinks" in words
    assert "no prefix is needed" not in words
    assert "no sink is to blame for the damage below" in words
    assert re.search(
        r"far from the original model, mostly because of (attn|mlp)\.\w+: SmoothQuant (removes|adds)", words
    )
    assert re.search(r"the rotation (removes|adds) 0\.\d+ \(disabled\)", words)
    assert "+ SmoothQuant (as a build makes it)" in words


def test_a_calibration_within_the_sliding_windows_is_told(tiny_writer: Any, look: Look, tmp_path: Path) -> None:
    folder = tiny_writer(tmp_path / "mistral", None, "mistral", sliding_window=12)
    said = look(folder, calibration__window=12).warnings
    assert any("3 of 3 layers look back 12 tokens, and calibration reads texts of 12" in text for text in said)
    for settings in ({"calibration__window": 13}, {}):
        assert not any("look back" in text for text in look(folder, **settings).warnings)
