"""`build` from model to bundle: what it leaves, what it prints, what a second run reuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.cli.next_steps import after_build
from cushion_deploy.recipe import Recipe
from cushion_deploy.recipe.text import parse_yaml
from cushion_deploy.report import Report
from cushion_deploy.store import verify_bundle

DRIVER = """
import sys
from cushion_deploy.cli.main import run
code = run(sys.argv[1:])
print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
# The keys that the file format promises; more may come.
PROMISED: dict[str, set[str]] = {
    "model": {"family", "parameters"},
    "perplexity": {"corpus", "window", "fp", "fp_prefix", "quantized", "quantized_prefix"},
    "search": {"mode", "token_ids", "tokens", "positions_scored", "positions_full_scan", "seconds"},
    "parity": {"rung", "metric", "value", "limit", "passed"},
    "engines": {"engine", "targets", "linears", "int8_linears", "fused_attention", "ran"},
    "stages": {"stage", "seconds", "reused"},
}


def test_a_build_leaves_a_bundle_that_verifies(cli: Any, tiny_bundle: Any) -> None:
    manifest = verify_bundle(tiny_bundle.bundle)
    assert set(manifest.parents) >= {"graph", "model"}
    assert cli("verify", tiny_bundle.bundle).code == 0
    left = [p.name for p in tiny_bundle.bundle.parent.iterdir()]
    assert sorted(left) == ["bundle", "work"]


def test_json_is_one_document_on_stdout_and_equals_the_file(tiny_bundle: Any) -> None:
    printed = tiny_bundle.result.json
    assert printed == json.loads((tiny_bundle.bundle / "report" / "report.json").read_text())
    assert "evaluate: done in " in tiny_bundle.result.err


@pytest.mark.parametrize("section", PROMISED)
def test_the_report_has_what_the_format_promises(planted_bundle: Any, section: str) -> None:
    text = (planted_bundle.bundle / "report" / "report.json").read_text()
    Report.model_validate_json(text)
    data = json.loads(text)
    assert data["schema"] == 1
    rows = data[section] if isinstance(data[section], list) else [data[section]]
    assert rows
    for row in rows:
        assert set(row) >= PROMISED[section]


def test_every_linear_runs_in_int8_and_every_check_holds(planted_bundle: Any) -> None:
    data = json.loads((planted_bundle.bundle / "report" / "report.json").read_text())
    (engine,) = data["engines"]
    # Three layers of seven linears, and the head.
    assert (engine["linears"], engine["int8_linears"], engine["ran"]) == (22, 22, True)
    assert all(check["passed"] for check in data["parity"])
    assert data["stages"]
    assert not any(stage["reused"] for stage in data["stages"])


def test_no_sink_ends_with_an_empty_prefix_in_words(cli: Any, tiny_bundle: Any) -> None:
    assert tiny_bundle.result.json["search"]["token_ids"] == []
    shown = cli("report", tiny_bundle.bundle)
    assert "No prefix was needed" in shown.out
    assert "no attention sink" in " ".join(shown.out.split())


def test_a_planted_sink_is_found(planted_bundle: Any) -> None:
    data = json.loads((planted_bundle.bundle / "report" / "report.json").read_text())
    assert data["search"]["token_ids"]
    largest = {which: max(layer["top1"] for layer in data["magnitudes"][which]) for which in ("with", "without")}
    assert largest["with"] < largest["without"] / 2
    assert "prefix" in planted_bundle.result.out
    assert str(planted_bundle.bundle) in planted_bundle.result.out


def test_a_second_build_reuses_every_stage_without_torch(python: Any, planted_bundle: Any, tmp_path: Path) -> None:
    output = tmp_path / "again"
    done = python(
        DRIVER, "build", *planted_bundle.options, "--engine", "onnxruntime", "--output", output, "--json", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    report = json.loads(done.stdout)
    assert [s["stage"] for s in report["stages"] if not s["reused"]] == []
    assert len(report["stages"]) >= 6
    assert verify_bundle(output).parents == verify_bundle(planted_bundle.bundle).parents


def test_quiet_says_nothing_but_the_result(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    done = cli("build", *tiny_bundle.options, "--engine", "onnxruntime", "--output", tmp_path / "b", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert "All" in done.out


def test_a_seed_decides_every_byte_of_the_graph(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    options = [*planted_bundle.options[:-1], tmp_path / "work"]
    assert cli("export", *options, "--output", tmp_path / "graph").code == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "graph" / name).read_bytes() == (planted_bundle.bundle / name).read_bytes()


def test_a_bundle_of_ours_is_replaced(cli: Any, tiny_bundle: Any, copy: Path) -> None:
    before = verify_bundle(copy)
    options = [*tiny_bundle.options, "--engine", "onnxruntime", "--set", "evaluation.max_tokens=64"]
    assert cli("build", *options, "--output", copy, "--quiet").code == 0
    after = verify_bundle(copy)
    assert after.recipe["evaluation"]["max_tokens"] == 64
    assert after.parents["graph"] == before.parents["graph"]


def test_dry_run_writes_nothing(cli: Any, tiny_folder: Path, small: list[str], tmp_path: Path) -> None:
    done = cli(
        "build", "--model", tiny_folder, *small, "--work-dir", tmp_path / "w", "--output", tmp_path / "o", "--dry-run"
    )
    assert done.code == 0
    assert list(tmp_path.iterdir()) == []
    for word in ("search", "calibrate", "export", "onnxruntime", str(tmp_path / "o")):
        assert word in done.out


def stages_of(cli: Any, *options: object) -> dict[str, bool]:
    """Return the stages of a dry run, and whether each is finished."""
    done = cli("build", *options, "--engine", "onnxruntime", "--dry-run", "--json")
    assert done.code == 0, done.err
    return {stage["stage"]: stage["finished"] for stage in done.json["stages"]}


def test_dry_run_as_json_is_one_object(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli(
        "build", *planted_bundle.options, "--output", tmp_path / "o", "--engine", "onnxruntime", "--dry-run", "--json"
    )
    assert done.code == 0
    stages = [stage["stage"] for stage in done.json["stages"]]
    assert {"search", "smooth", "calibrate", "export", "engine-onnxruntime", "parity"} <= set(stages)
    assert "tune" not in stages
    assert done.json["output"] == str(tmp_path / "o")
    assert done.json["engines"] == ["onnxruntime"]


def test_dry_run_says_what_an_earlier_build_has_finished(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    options = [*planted_bundle.options, "--output", tmp_path / "o"]
    assert set(stages_of(cli, *options).values()) == {True}
    # Another percentile needs other scales, and everything behind them; the search and smoothing stay as they are.
    later = stages_of(cli, *options, "--set", "calibration.percentile=99.5")
    assert {name for name, finished in later.items() if finished} >= {"tokenizer", "search", "smooth"}
    assert not any(later[name] for name in ("calibrate", "export", "engine-onnxruntime", "evaluate", "parity"))
    # Options of a compilation count as well.
    allowed = stages_of(cli, *options, "--allow-float-linears", "3")
    assert (allowed["export"], allowed["engine-onnxruntime"]) == (True, False)


def test_dry_run_keeps_a_damaged_stage_and_says_that_it_runs_again(
    cli: Any, planted_bundle: Any, tmp_path: Path
) -> None:
    work = shutil.copytree(planted_bundle.work, tmp_path / "work")
    damaged = list((work / "stages" / "calibrate").glob("*/scales.json"))
    for scales in damaged:
        scales.write_text(scales.read_text() + " ")
    options = [*planted_bundle.options, "--work-dir", work, "--output", tmp_path / "o"]
    found = stages_of(cli, *options)
    assert not found["calibrate"]
    assert found["search"]
    assert damaged
    assert all(scales.is_file() for scales in damaged)
    assert not found["parity"], "nothing behind an unfinished stage is known to be finished"


def test_dry_run_refuses_what_a_build_would(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    options = [*planted_bundle.options, "--output", tmp_path / "o", "--engine", "onnxruntime", "--dry-run"]
    calibration = options[options.index("--calib-data") + 1]
    same = cli("build", *options, "--eval-data", calibration)
    assert (same.code, "is also the calibration text" in same.err) == (2, True)
    long = cli("build", *options, "--set", "search.text_tokens=100000")
    assert (long.code, "search.text_tokens is 100000" in long.err) == (2, True)
    # A text sampled from the model is not known before.
    sampled = ["--calib-data", "self", "--eval-data", calibration]
    assert cli("build", *options, *sampled, "--work-dir", tmp_path / "w").code == 0


@pytest.mark.parametrize("option", ["evaluation.data=self", "parity.data=self"])
def test_dry_run_leaves_out_what_needs_a_text_that_is_not_sampled_yet(
    cli: Any, planted_bundle: Any, tmp_path: Path, option: str
) -> None:
    options = [*planted_bundle.options, "--output", tmp_path / "o", "--set", option]
    found = stages_of(cli, *options)
    assert (found["search"], found["sample"], found["parity"]) == (True, False, False)
    assert set(stages_of(cli, *options, "--work-dir", tmp_path / "w").values()) == {False}


@pytest.mark.parametrize(("calibration", "said"), [("self", "the"), (None, "part of the")])
def test_text_sampled_for_calibration_is_not_evaluated_on(
    cli: Any, tiny_folder: Path, tmp_path: Path, calibration: str | None, said: str
) -> None:
    texts = ["--eval-data", "self", *(["--calib-data", calibration] if calibration else [])]
    places = ["--output", tmp_path / "o", "--work-dir", tmp_path / "w"]
    done = cli("build", "--model", tiny_folder, *texts, *places, "--engine", "onnxruntime")
    assert (done.code, f"self is also {said} calibration text" in done.err) == (2, True)
    assert not (tmp_path / "w").exists()


def test_dry_run_says_that_the_disk_is_too_small(
    cli: Any, planted_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_999, 1))
    options = [*planted_bundle.options, "--output", tmp_path / "o", "--engine", "onnxruntime", "--dry-run"]
    assert cli("build", *options).code == 0, "everything is finished"
    done = cli("build", *options, "--set", "export.opset=18")
    assert (done.code, "not enough disk space" in done.err) == (2, True)


def test_dry_run_finds_bad_input(cli: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert cli("build", "--model", tiny_folder, "--output", tmp_path / "mine", "--dry-run").code == 2
    assert cli("build", "--model", tmp_path / "none.gguf", "--output", tmp_path / "o", "--dry-run").code == 2


def test_print_config_round_trips(cli: Any, tmp_path: Path) -> None:
    flags = ["--seed", "7", "--seed-token", "a", "--set", "search.tau=0.25", "--no-quantize-head", "--engine", "x"]
    first = cli("build", *flags, "--print-config")
    assert first.code == 0
    values = parse_yaml(first.out)
    assert (values["seed"], values["search"]["seed_tokens"], values["search"]["tau"]) == (7, ["a"], 0.25)
    assert (values["export"]["quantize_head"], values["engines"]) == (False, ["x"])
    (tmp_path / "r.yaml").write_text(first.out)
    assert cli("build", "--recipe", tmp_path / "r.yaml", "--print-config").out == first.out


def test_flags_stand_over_the_recipe_and_set_over_flags(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\nsearch: {max_length: 2, tau: 0.3}\n")
    done = cli("build", "--recipe", tmp_path / "r.yaml", "--max-length", 3, "--set", "seed=5", "--print-config")
    recipe = Recipe.model_validate(parse_yaml(done.out))
    assert (recipe.seed, recipe.search.max_length, recipe.search.tau) == (5, 3, 0.3)


def test_set_null_stands_over_the_recipe(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("engines: [onnxruntime]\ncalibration: {data: a.txt}\nevaluation: {data: b.txt}\n")
    recipe = ("build", "--recipe", tmp_path / "r.yaml", "--print-config")
    done = cli(*recipe, "--set", "engines=null", "--set", "calibration.data=null")
    values = parse_yaml(done.out)
    assert (values["engines"], values["calibration"]["data"], values["evaluation"]["data"]) == (None, None, "b.txt")
    done = cli(*recipe, "--set", "search.tau=null")
    assert done.code == 2
    assert "search.tau is null" in done.err


TENSORRT = {"dtype": "auto", "max_batch": 1, "max_context": 2048, "max_prefill": 512}
"""Defaults of a recipe."""


def test_the_limits_of_tensorrt_are_settings_and_flags_stand_over_them(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("tensorrt: {max_batch: 3, max_context: 96}\n")
    done = cli("build", "--recipe", tmp_path / "r.yaml", "--max-context", 64, "--print-config")
    assert parse_yaml(done.out)["tensorrt"] == {
        **{"dtype": "auto", "max_batch": 3, "max_context": 64, "max_prefill": 512}
    }
    assert cli("build", "--recipe", tmp_path / "r.yaml", "--max-batch", 0, "--print-config").code == 2


def test_engines_are_compiled_within_the_limits_of_the_recipe(
    cli: Any, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.stages.compile import Compile

    asked = []
    real = Compile.read

    def record(stage: Compile, folder: Path) -> Any:
        asked.append((stage.options.max_batch, stage.options.max_context))
        return real(stage, folder)

    monkeypatch.setattr(Compile, "read", record)
    done = cli(
        *(
            "build",
            *tiny_bundle.options,
            "--engine",
            "onnxruntime",
            "--max-batch",
            2,
            "--set",
            "tensorrt.max_context=96",
        ),
        *("--output", tmp_path / "b", "--quiet"),
    )
    assert done.code == 0, done.err
    assert verify_bundle(tmp_path / "b").recipe["tensorrt"] == TENSORRT | {"max_batch": 2, "max_context": 96}

    engine = ("engine", tmp_path / "b", "--engine", "onnxruntime", "--work-dir", tiny_bundle.work)
    assert cli(*engine, "--output", tmp_path / "e").code == 0
    assert cli(*engine, "--output", tmp_path / "f", "--max-batch", 5).code == 0
    assert asked == [(2, 96), (2, 96), (5, 96)]


def test_a_failed_check_still_writes_the_bundle_and_exits_1(
    cli: Any, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from cushion_deploy.parity.checks import ParityCheck
    from cushion_deploy.stages.parity import Parity

    real = Parity.read

    def failing(*arguments: Any) -> Any:
        result = real(*arguments)
        check = ParityCheck("a rung", "a metric", 2.0, 1.0, "at most")
        return replace(result, report=replace(result.report, checks=(*result.report.checks, check)))

    monkeypatch.setattr(Parity, "read", failing)
    done = cli("build", *tiny_bundle.options, "--engine", "onnxruntime", "--output", tmp_path / "b", "--json")
    assert done.code == 1
    assert [c["rung"] for c in done.json["parity"] if not c["passed"]] == ["a rung"]
    verify_bundle(tmp_path / "b")


def test_tensorrt_rtx_beside_onnxruntime(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = cli(
        *("build", *tiny_bundle.options, "--engine", "onnxruntime", "--engine", "tensorrt-rtx", "--target", "sm86"),
        *("--max-context", "128", "--output", tmp_path / "b", "--json", "--quiet"),
    )
    assert done.code == 0, done.err
    engines = {e["engine"]: e for e in done.json["engines"]}
    assert set(engines) == {"onnxruntime", "tensorrt-rtx"}
    assert engines["tensorrt-rtx"]["targets"] == ["sm86"]
    assert engines["tensorrt-rtx"]["int8_linears"] == engines["tensorrt-rtx"]["linears"] == 22
    listed = {name.split("/")[1] for name in verify_bundle(tmp_path / "b").files if name.startswith("engines/")}
    assert listed == {"onnxruntime", "tensorrt-rtx"}


@pytest.mark.parametrize("ship", ["auto", "always"])
def test_a_prefix_that_is_wanted_and_not_wanted_is_refused(cli: Any, tiny_folder: Path, ship: str) -> None:
    done = cli("build", "--model", tiny_folder, "--no-prefix", "--prefix", ship)
    assert done.code == 2
    assert f"--no-prefix contradicts --prefix {ship}" in done.err


def test_never_is_no_prefix(cli: Any, tiny_folder: Path) -> None:
    printed = [
        cli("build", "--model", tiny_folder, *how, "--print-config").out
        for how in (["--prefix", "never"], ["--no-prefix"])
    ]
    assert printed[0] == printed[1]
    assert "enabled: false" in printed[0]


def test_the_summary_names_what_to_try_next(planted_bundle: Any) -> None:
    out, bundle = planted_bundle.result.out, planted_bundle.bundle
    steps = [line.split("  ")[1] for line in out[out.index("\nnext:\n") :].splitlines()[2:]]
    assert [step.split()[-2:] for step in steps] == [[verb, str(bundle)] for verb in ("chat", "serve", "bench")]


def test_after_failed_checks_the_next_steps_find_out_why(tmp_path: Path) -> None:
    steps = after_build(tmp_path / "a b", "m.gguf", passed=False)
    assert [verb for verb in ("report", "parity", "doctor") if any(f" {verb} " in step for step in steps)] == [
        *("report", "parity", "doctor")
    ]
    assert f"'{tmp_path}/a b'" in steps[0], "a path with a space can be pasted into a shell"


def test_the_next_steps_name_the_program_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/cushion-deploy"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert after_build(tmp_path, "m", passed=True)[0].startswith("  .venv/bin/cushion-deploy generate ")
    # Another installation comes first in the path of the shell.
    monkeypatch.setattr("shutil.which", lambda name: f"{tmp_path}/{name}")
    assert after_build(tmp_path, "m", passed=True)[0].startswith("  .venv/bin/cushion-deploy generate ")
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).with_name(name)))
    assert after_build(tmp_path, "m", passed=True)[0].startswith("  cushion-deploy generate ")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["/x/cushion_deploy/__main__.py"])
    assert after_build(tmp_path, "m", passed=True)[0].startswith("  python -m cushion_deploy generate ")
