"""`tune` writes the files that `export` takes, and says what it cannot tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.artifacts import read_prefix

TUNING = [
    "--set",
    "tuning.windows=4",
    "--set",
    "tuning.held_out=2",
    "--set",
    "tuning.window=24",
    "--set",
    "tuning.batch=2",
    "--set",
    "tuning.epochs=2",
    "--set",
    "tuning.judge_every=1",
]


def test_the_files_of_a_tuning_make_a_graph(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli("tune", *planted_bundle.options, *TUNING, "--output", tmp_path / "tuned", "--json")
    assert done.code == 0, done.err
    states = done.json["states"]
    assert states[0]["step"] == 0
    assert len(states) == 1 + done.json["steps"]
    names = sorted(file.name for file in (tmp_path / "tuned").iterdir())
    assert names == ["prefix.safetensors", "scales.json", "smoothing.safetensors"]
    tuned = read_prefix(tmp_path / "tuned" / "prefix.safetensors")
    plain = read_prefix(planted_bundle.bundle / "prefix.safetensors")
    best = min(states, key=lambda s: s["held_out"])
    assert np.array_equal(tuned.keys, plain.keys) is (best["step"] == 0)
    files = ["--prefix", tmp_path / "tuned" / names[0], "--scales", tmp_path / "tuned" / names[1]]
    wrong = cli("export", *planted_bundle.options, *files, "--output", tmp_path / "graph")
    assert (wrong.code, "another smoothing" in wrong.err) == (2, True)
    files += ["--smoothing", tmp_path / "tuned" / names[2]]
    assert cli("export", *planted_bundle.options, *files, "--output", tmp_path / "graph").code == 0
    assert (tmp_path / "graph" / "model.onnx").is_file()


def test_an_invisible_prefix_is_tuned_on_through_the_quantized_model(
    cli: Any, planted_bundle: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    faster = [*TUNING, "--set", "tuning.learning_rate=0.1"]
    done = cli("tune", *planted_bundle.options, *faster, "--output", first)
    assert done.code == 0, done.err
    assert "step    0: divergence on held-out text" in done.out
    assert ", from position 16 on" in done.out
    assert "quantization error 1.000 times the untuned" in done.out
    more = [*TUNING, "--set", "tuning.loss=distill"]
    done = cli("tune", *planted_bundle.options, *more, "--prefix", first / "prefix.safetensors", "--output", second)
    assert done.code == 0, done.err
    assert "step    0: distill on held-out text" in done.out
    begun, ended = (read_prefix(folder / "prefix.safetensors") for folder in (first, second))
    plain = read_prefix(planted_bundle.bundle / "prefix.safetensors")
    assert not np.array_equal(begun.keys, plain.keys)
    distance = [float(np.abs(prefix.keys - begun.keys).max()) for prefix in (plain, ended)]
    assert distance[1] < distance[0], "the second run begins at the result of the first"


def test_a_tuning_with_an_int8_cache_has_the_scales_of_the_cache(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    options = (*planted_bundle.options, "--kv-cache", "int8", "--work-dir", tmp_path / "w")
    tuned = tmp_path / "tuned"
    assert cli("tune", *options, *TUNING, "--output", tuned).code == 0
    files = ["--prefix", tuned / "prefix.safetensors", "--scales", tuned / "scales.json"]
    files += ["--smoothing", tuned / "smoothing.safetensors", "--kv-scales", tuned / "kv_scales.json"]
    done = cli("export", *options, *files, "--output", tmp_path / "graph", "--json")
    assert done.code == 0, done.err
    assert done.json["contract"]["quantized_cache"]


def test_a_model_without_sink_has_nothing_to_tune(
    cli: Any, tiny_folder: Path, small: list[str], tmp_path: Path
) -> None:
    options = ["--model", tiny_folder, *small, *TUNING, "--work-dir", tmp_path / "w"]
    done = cli("tune", *options, "--output", tmp_path / "tuned")
    assert done.code == 2
    assert "no prefix to tune: the search found none" in done.err
    assert not (tmp_path / "tuned").exists()
    assert not list((tmp_path / "w" / "stages").glob("calibrate*")), "nothing was calibrated in vain"
    disabled = cli("tune", *options[:-1], tmp_path / "v", "--no-prefix", "--output", tmp_path / "tuned")
    assert (disabled.code, disabled.out) == (2, "")
    assert "no prefix to tune: the recipe disables it" in disabled.err
    assert not (tmp_path / "v").exists()


def test_smoothing_without_its_scales_is_refused(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    smoothing = planted_bundle.bundle / "smoothing.safetensors"
    done = cli("export", *planted_bundle.options, "--smoothing", smoothing, "--output", tmp_path / "graph")
    assert done.code == 2
    assert "--smoothing was given without --scales" in done.err


@pytest.mark.parametrize("flags", [["--smooth-alpha", "2"], ["--set", "tuning.epochs=0"]])
def test_settings_out_of_range_are_refused(cli: Any, flags: list[str]) -> None:
    done = cli("build", *flags, "--print-config")
    assert done.code == 2
    assert "expected a value" in done.err
