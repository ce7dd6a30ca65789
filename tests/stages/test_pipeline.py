"""The build as a function: stages kept by what decides them, an empty prefix end to end, nothing left by a failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from one_run import OneRun

from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.recipe import ROTATIONS, Recipe
from cushion_deploy.stages.compile import Compile
from cushion_deploy.stages.report import merge_times
from cushion_deploy.stages.run import Run, StageTime
from cushion_deploy.store import StageStore, verify_bundle
from cushion_deploy.verbs.build import dry_run

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.ship": "always",
    "search.text_tokens": 64,
    "search.random_candidates": 8,
    "search.screen_candidates": 8,
    "search.audit_tokens": 4,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 64,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
}


MakeRun = Callable[..., OneRun]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder that the tests of this file share."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def one_run(planted_folder: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that makes a run; a new one each time, as in a process of its own."""
    texts = tmp_path_factory.mktemp("texts")
    (texts / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (texts / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    data = {"calibration.data": str(texts / "calib.txt"), "evaluation.data": str(texts / "eval.txt")}

    def make(work: Path = kept, model: Path = planted_folder, **more: object) -> OneRun:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        recipe = Recipe().merged({"model": str(model), **data, **SETTINGS, **changes})
        return OneRun.of(recipe, work)

    return make


def reused(one: OneRun) -> dict[str, bool]:
    """Return for every stage whether an earlier run's result served at its first use; loading is not one that can."""
    return {
        row["stage"]: row["reused"] for row in merge_times(one.run.times) if row["stage"] not in ("load", "tokenizer")
    }


def graph_of(one: OneRun) -> Any:
    """Return the graph of a build, everything before it made or reused."""
    return one.run.get(one.pipeline.graph(one.pipeline.quantized.quantization))


def test_a_change_runs_again_what_it_decides_and_nothing_else(one_run: MakeRun) -> None:
    def run(**changes: object) -> dict[str, bool]:
        one = one_run(**changes)
        graph_of(one)
        return reused(one)

    everything = {"embedding": True, "search": True, "smooth": True, "calibrate": True, "export": True}
    assert set(run().values()) <= {True, False}
    assert run() == everything
    # Smoothing reads no range estimator.
    assert run(calibration__estimator="max") == {**everything, "calibrate": False, "export": False}
    assert run(calibration__windows=3) == {**everything, "smooth": False, "calibrate": False, "export": False}
    assert run(smoothing__alpha=0.7) == {**everything, "smooth": False, "calibrate": False, "export": False}
    nothing = {"smoothing__alpha": None, **{f"smoothing__{name}": 0 for name in ROTATIONS}}
    assert run(**nothing) == {"embedding": True, "search": True, "calibrate": False, "export": False}
    assert run(search__tau=0.6)["search"] is False
    assert run(export__quantize_head=True, calibration__estimator="max")["calibrate"] is True
    assert run(evaluation__max_tokens=128, parity__tokens=16) == everything


def test_the_seed_decides_the_search(one_run: MakeRun, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        one = one_run(tmp_path / name, seed=seed)
        result = one.run.get(one.pipeline.search)
        prefix = result.prefix
        found.append((prefix.token_ids, prefix.keys, {**result.trace.to_json(), "seconds": None}))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert found[0][2] != found[2][2]


def test_calibration_before_and_after_the_prefix_are_two_stages(one_run: MakeRun) -> None:
    one = one_run()
    assert one.quantization.prefix.length > 0
    result = one.run.get(one.pipeline.evaluation)
    assert {"calibrate", "calibrate-without-prefix"} <= set(reused(one))
    columns = result["perplexity"]
    assert {"fp", "fp_prefix", "quantized", "quantized_prefix"} <= set(columns)
    assert len(result["magnitudes"]["with"]) == len(result["magnitudes"]["without"])


def test_no_prefix_leaves_no_prefix_in_graph_and_report(one_run: MakeRun, tmp_path: Path) -> None:
    report = one_run(search__enabled=False).build(tmp_path / "out")
    assert report.search is None
    assert report.perplexity.fp == report.perplexity.fp_prefix
    assert report.perplexity.quantized == report.perplexity.quantized_prefix
    assert json.loads((tmp_path / "out" / "export.json").read_text())["contract"]["prefix_length"] == 0
    manifest = verify_bundle(tmp_path / "out")
    assert manifest.recipe["search"]["enabled"] is False
    # The graph that was published is the graph that was checked.
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    assert (tmp_path / "out" / "model.onnx.data").stat().st_nlink == 1


def test_a_failure_leaves_no_bundle_and_keeps_what_was_finished(
    one_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise CheckFailed("the engine broke", hint="repair it")

    with monkeypatch.context() as patch:
        patch.setattr(Compile, "run", broken)
        with pytest.raises(CheckFailed, match="the engine broke"):
            one_run(tmp_path / "work").build(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    again = one_run(tmp_path / "work")
    graph_of(again)
    assert reused(again) == dict.fromkeys(("embedding", "search", "smooth", "calibrate", "export"), True)
    # An engine that cannot be compiled is known before the model is evaluated.
    assert not {kept.name.partition("-")[0] for kept in (tmp_path / "work" / "stages").iterdir()} & {
        "evaluate",
        "parity",
    }


def test_two_builds_do_not_share_a_work_folder(one_run: MakeRun, tmp_path: Path) -> None:
    with one_run(tmp_path / "work").run.store.lock(), pytest.raises(UsageError, match="another command is using"):
        one_run(tmp_path / "work").build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model was given"):
        dry_run(Recipe(), Run(StageStore(tmp_path / "w")), tmp_path / "out")


@pytest.mark.parametrize("prefix", ["<bos>", "a", None])
def test_text_behind_a_prefix_comes_without_bos_as_it_was_calibrated(
    one_run: MakeRun, tmp_path: Path, prefix: str | None
) -> None:
    from cushion_deploy.runtime import load

    seeds = [prefix] if prefix else []
    one_run(search__enabled=bool(prefix), search__seed_tokens=seeds, search__max_length=1).build(tmp_path / "out")
    generator = load(tmp_path / "out")
    plain = len(generator.bundle.tokenizer.encode("The fox", add_special_tokens=False).ids)
    usage = generator.generate("The fox", max_new_tokens=1).usage
    assert usage.prompt_tokens == plain + (prefix is None), "the tokenizer puts <s> before a text"


def test_a_stage_without_room_on_the_disk_is_refused_before_it_runs(
    one_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cushion_deploy.store.files as files

    one_run(tmp_path / "work").build(tmp_path / "out")
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1)
    with pytest.raises(UsageError, match="not enough disk space"):
        one_run(tmp_path / "other").build(tmp_path / "another")
    assert not list((tmp_path / "other" / "stages").glob("export/*"))
    # What is kept needs no room.
    one = one_run(tmp_path / "work")
    graph_of(one)
    assert all(reused(one).values())


def test_an_edit_of_a_bundle_file_does_not_reach_the_store(one_run: MakeRun, tmp_path: Path) -> None:
    one_run().build(tmp_path / "out")
    shared = [p.name for p in (tmp_path / "out").rglob("*") if p.is_file() and p.stat().st_nlink > 1]
    assert shared == []


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("search__text_tokens", "search.text_tokens"),
        ("calibration__window", "calibration.window"),
        ("evaluation__window", "evaluation.window"),
        ("parity__tokens", "parity.tokens"),
    ],
)
def test_text_longer_than_the_positions_is_refused_before_the_search(
    one_run: MakeRun, tmp_path: Path, setting: str, name: str
) -> None:
    # The tiny model has 256 positions, and the prefix may take 4 of them.
    room = 252 - (2 if name.startswith("parity") else 0)
    one = one_run(tmp_path / "work", **{setting: room + 1, "evaluation__max_tokens": 256})
    with pytest.raises(UsageError, match=f"{name}.* leaves 252 of the model's 256 positions"):
        one.build(tmp_path / "out")
    assert not (tmp_path / "work" / "stages" / "search").exists()


def test_a_verb_alone_refuses_a_window_that_does_not_fit(one_run: MakeRun, tmp_path: Path) -> None:
    one = one_run(tmp_path / "work", calibration__window=257)
    with pytest.raises(UsageError, match=r"calibration\.window is 257"):
        one.quantization  # noqa: B018 - it is computed


def write_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("edited {{ messages }}")


def write_inline_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "edited {{ messages }}"}))


def write_generation_config(folder: Path) -> None:
    # Greedy with settings of sampling, and a padding token that is none: transformers reads this, and may not write it.
    odd = {"do_sample": False, "temperature": 0.25, "top_p": 0.9, "pad_token_id": -1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], **odd}))


@pytest.mark.parametrize("edit", [write_template, write_inline_template, write_generation_config])
def test_an_edited_template_gives_a_new_bundle_and_only_evaluates_again(
    one_run: MakeRun, planted_folder: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    from cushion_deploy.runtime.bundle import open_bundle

    one_run().build(tmp_path / "before")
    model = Path(shutil.copytree(planted_folder, tmp_path / "model"))
    edit(model)
    one = one_run(model=model)
    one.build(tmp_path / "after")
    again = {row["stage"] for row in merge_times(one.run.times) if not row["reused"]}
    # Chats are among what is evaluated, so another template or another end of answers changes the evaluation.
    assert again - {"evaluate"} == {"load", "tokenizer"}
    assert edit is not write_generation_config or "evaluate" in again
    before, after = open_bundle(tmp_path / "before"), open_bundle(tmp_path / "after")
    assert after.manifest.parents == before.manifest.parents
    if edit is write_generation_config:
        assert (before.eos_token_ids, after.eos_token_ids) == ((2,), (2, 7))
        assert json.loads((tmp_path / "after" / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, 7]
        assert after.generation_config["temperature"] == 0.25
    else:
        assert after.require_chat_template().source == "edited {{ messages }}"


def write_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 2e-6}))


def write_weight(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-4, os.SEEK_END)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("edit", [write_config, write_weight])
def test_an_edited_model_runs_everything_again(
    one_run: MakeRun, planted_folder: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    graph_of(one_run())
    model = Path(shutil.copytree(planted_folder, tmp_path / "model"))
    edit(model)
    one = one_run(model=model)
    graph_of(one)
    stages = ("search", "smooth", "calibrate", "embedding", "export")
    assert reused(one) == dict.fromkeys(stages, False)


def test_a_stage_asked_for_twice_is_one_row_and_not_reused() -> None:
    times = [StageTime("a", 2.0, False, "cpu, float32"), StageTime("b", 1.0, True), StageTime("a", 0.5, True)]
    assert merge_times(times) == [
        {"stage": "a", "seconds": 2.5, "reused": False, "ran_on": "cpu, float32"},
        {"stage": "b", "seconds": 1.0, "reused": True, "ran_on": ""},
    ]
