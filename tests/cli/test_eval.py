"""`eval`: the numbers of the build again, the engine beside them, and what a bad command is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.store import StageStore

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "datasets", "lm_eval", "onnxruntime"}
COLUMNS = ["fp", "fp-prefix", "quantized", "quantized-prefix", "engine"]


@pytest.fixture(scope="module")
def evaluated(cli: Any, planted_bundle: Any) -> Any:
    """Return what `eval --json` says of a bundle with a prefix, on the text of its build."""
    return cli("eval", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--json", "--quiet")


def test_a_bundle_has_five_columns_that_agree_with_its_report(evaluated: Any, planted_bundle: Any) -> None:
    assert (evaluated.code, evaluated.err) == (0, "")
    report = json.loads((planted_bundle.bundle / "report" / "report.json").read_text())
    found = evaluated.json
    assert found["columns"] == COLUMNS
    (text,) = found["texts"]
    for column in COLUMNS[:4]:
        expected = report["perplexity"][column.replace("-", "_")]
        assert text["columns"][column]["perplexity"] == pytest.approx(expected, rel=2e-3), column
    assert text["tokens"] == 2 * 63
    assert all(value["stderr"] > 0 for value in text["columns"].values())


def test_the_engine_is_compared_with_fake_quant(evaluated: Any) -> None:
    (check,) = evaluated.json["agreement"]
    columns = evaluated.json["texts"][0]["columns"]
    apart = abs(columns["engine"]["perplexity"] / columns["quantized-prefix"]["perplexity"] - 1)
    assert check["difference"] == pytest.approx(apart, abs=1e-9)
    assert check["limit"] >= 0.005
    assert check["passed"]
    assert evaluated.json["passed"]


def test_an_engine_that_differs_ends_in_exit_code_1(
    cli: Any, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.verbs import columns as evaluating

    right = evaluating.score_text

    def shifted(nll: Any, windows: Any, progress: Any, task: str) -> TextScore:
        score = right(nll, windows, progress, task)
        return TextScore(score.losses + 0.02) if task.endswith("engine") else score

    monkeypatch.setattr(evaluating, "score_text", shifted)
    done = cli("eval", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--columns", "quantized-prefix,engine")
    assert done.code == 1
    assert "FAIL engine vs. fake-quant" in done.out


def test_a_bundle_without_a_prefix_has_no_columns_twice(cli: Any, tiny_bundle: Any) -> None:
    done = cli("eval", tiny_bundle.bundle, "--work-dir", tiny_bundle.work)
    assert done.code == 0, done.err
    heading = done.out.splitlines()[0].split()
    assert heading == ["FP", "W8A8", "engine"]
    (agreement,) = (line for line in done.out.splitlines() if line.startswith("ok   engine vs. fake-quant"))
    # At least 0.5 % of the perplexity are allowed.
    assert re.search(r": perplexity differs by 0\.\d\d % \(limit 0\.[5-9]\d %\)$", agreement)
    refused = cli("eval", tiny_bundle.bundle, "--columns", "fp-prefix")
    assert refused.code == 2
    assert "without a prefix" in refused.err


def test_a_model_is_scored_in_floating_point(cli: Any, tiny_folder: Path, tiny_model: Any, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "text.txt").write_text(text)
    done = cli(
        *("eval", tiny_folder, "--data", tmp_path / "text.txt", "--window", 50, "--max-tokens", 100),
        *("--work-dir", tmp_path / "work", "--json", "--quiet"),
    )
    assert done.code == 0, done.err
    assert done.json["columns"] == ["fp"]
    ids = torch.tensor(tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"][:100]).reshape(2, 50)
    with torch.inference_mode():
        expected = tiny_model.module(input_ids=ids, labels=ids).loss.exp().item()
    (row,) = done.json["texts"]
    assert (row["text"], row["window"], row["tokens"]) == ("text.txt", 50, 98)
    assert row["text_tokens"] == len(tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert row["columns"]["fp"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_wikitext_is_all_of_its_test_split_in_the_longest_windows(
    cli: Any, tiny_folder: Path, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    rows = ["", " = The fox = \n", "", " The quick brown fox jumps over the lazy dog . \n"] * 20
    home = tmp_path / "Salesforce" / "wikitext"
    home.mkdir(parents=True)
    (home / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = "configs:\n- {config_name: wikitext-2-raw-v1, data_files: [{split: test, path: test.jsonl}]}\n"
    (home / "README.md").write_text(f"---\n{config}---\n")
    monkeypatch.chdir(tmp_path)
    ids = tiny_model.tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    # The model has 256 positions, fewer than the 2048 of published results.
    count = len(ids) // 256
    windows = torch.tensor(ids[: count * 256]).reshape(count, 256)
    with torch.inference_mode():
        expected = tiny_model.module(input_ids=windows, labels=windows).loss.exp().item()
    options = ("eval", tiny_folder, "--data", "wikitext", "--work-dir", tmp_path / "work", "--quiet")
    done = cli(*options, "--json")
    assert done.code == 0, done.err
    (row,) = done.json["texts"]
    assert (row["window"], row["tokens"], row["text_tokens"]) == (256, count * 255, len(ids))
    assert row["columns"]["fp"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    shown = cli(*options)
    assert f"(test), all {len(ids):,} tokens (perplexity)" in shown.out
    shown = cli(*options, "--max-tokens", 512, "--window", 128)
    assert f"(test), first 512 of {len(ids):,} tokens (perplexity)" in shown.out


def test_several_texts_are_several_rows(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The fox {name} jumps over the lazy dog. " * 20)
    texts = [option for name in ("a.txt", "b.txt") for option in ("--data", tmp_path / name)]
    done = cli("eval", tiny_bundle.bundle, *texts, "--columns", "engine", "--json", "--quiet")
    assert [row["text"] for row in done.json["texts"]] == ["a.txt", "b.txt"]
    assert (done.json["columns"], done.json["agreement"]) == (["engine"], [])


def test_the_engine_alone_needs_no_model(cli: Any, tiny_bundle: Any, python: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox jumps over the lazy dog. " * 40)
    code = (
        "import sys\nfrom cushion_deploy.cli.main import run\n"
        "code = run(['eval', *sys.argv[1:], '--columns', 'engine', '--quiet'])\n"
        "assert code == 0 and 'torch' not in sys.modules"
    )
    done = python(code, tiny_bundle.bundle, "--data", tmp_path / "text.txt")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "fq"], "unknown column 'fq'"),
        (["--limit", "3"], "--limit needs --tasks"),
        (["--batch-size", "3"], "--batch-size needs --tasks"),
        (["--chat-template"], "--chat-template needs --tasks"),
        (["--window", "100000", "--columns", "engine"], "longer than the"),
        (["--recipe", "r.yaml"], "--recipe cannot be used with a bundle"),
        (["--data", "nowhere.txt", "--columns", "engine"], "unknown data set"),
    ],
)
def test_what_cannot_be_done_is_refused(cli: Any, tiny_bundle: Any, options: list[str], message: str) -> None:
    done = cli("eval", tiny_bundle.bundle, *options, "--quiet")
    assert done.code == 2
    assert message in done.err


def test_columns_of_a_bundle_are_refused_for_a_model(cli: Any, tiny_folder: Path) -> None:
    done = cli("eval", tiny_folder, "--columns", "engine")
    assert done.code == 2
    assert "has not been built" in done.err


def test_a_model_that_is_absent_is_named_while_the_work_folder_is_in_use(cli: Any, tmp_path: Path) -> None:
    with StageStore(tmp_path / "work").lock():
        done = cli("eval", tmp_path / "gone", "--work-dir", tmp_path / "work")
    assert done.code == 2
    assert "does not exist" in done.err


def test_another_model_is_not_the_bundles(cli: Any, tiny_bundle: Any, planted_folder: Path, tmp_path: Path) -> None:
    done = cli("eval", tiny_bundle.bundle, "--model", planted_folder, "--work-dir", tmp_path, "--columns", "fp")
    assert done.code == 2
    assert "not the model that the bundle was built from" in done.err


def test_a_damaged_bundle_is_not_scored(cli: Any, copy: Path) -> None:
    with (copy / "scales.json").open("a") as f:
        f.write(" ")
    assert cli("eval", copy, "--columns", "engine").code == 4


def test_without_lm_eval_tasks_exit_with_3(cli: Any, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = cli("eval", tiny_bundle.bundle, "--tasks", "piqa")
    assert done.code == 3
    assert "pip install 'cushion-deploy[eval]'" in done.err


def write_task(folder: Path) -> None:
    (folder / "pick.yaml").write_text(
        "task: tiny_pick\ndataset_path: json\ndataset_kwargs: {data_files: {validation: pick.jsonl}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: c\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    rows = [{"q": f"The fox {i}", "c": [" jumps", " sleeps", " is gone"], "a": i % 3} for i in range(60)]
    (folder / "pick.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_tasks_have_a_row_each_a_mean_and_an_agreement(
    cli: Any, planted_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    options = ["--work-dir", planted_bundle.work, "--tasks", tmp_path, "--limit", 50, "--quiet"]
    options += ["--columns", "quantized-prefix,engine"]
    done = cli("eval", planted_bundle.bundle, *options, "--json")
    assert done.code in (0, 1), done.err
    (row,) = done.json["tasks"]
    assert (row["task"], row["metric"], row["n"]) == ("tiny_pick", "acc", 50)
    acc = {column: values["acc"] for column, values in row["columns"].items()}
    (check,) = done.json["agreement"]
    assert check["difference"] == pytest.approx(abs(acc["engine"]["value"] - acc["quantized-prefix"]["value"]))
    assert check["limit"] == acc["quantized-prefix"]["stderr"]
    assert done.json["mean"]["engine"]["value"] == acc["engine"]["value"]
    assert done.json["texts"] == []
    shown = cli("eval", planted_bundle.bundle, *options)
    assert "tiny_pick (acc, n=50)" in shown.out
    assert "mean of the tasks" in shown.out
    assert "±" in shown.out
    alone = cli("eval", planted_bundle.bundle, *options, "--batch-size", 1, "--json")
    assert alone.json["tasks"] == done.json["tasks"]
    assert done.json["chat_template"] is False
    chat = cli("eval", planted_bundle.bundle, *options, "--chat-template", "--json")
    assert chat.code in (0, 1), chat.err
    assert chat.json["chat_template"] is True
    assert chat.json["tasks"] != done.json["tasks"]
    shown = cli("eval", planted_bundle.bundle, *options, "--chat-template", "--columns", "engine")
    assert "tiny_pick (acc, n=50, chat template)" in shown.out


def test_lm_evals_own_command_line_runs_a_bundle(planted_bundle: Any, tmp_path: Path, python: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    write_task(tmp_path)
    code = (
        "import os, sys\nos.chdir(sys.argv.pop(1))\nos.environ['HF_DATASETS_CACHE'] = 'cache'\n"
        "from cushion_deploy.evaluate.lm_harness import main\n"
        # Its own tasks, thousands of files, are not needed for one that is given as a file.
        "import lm_eval.tasks as t\nright = t.TaskManager\n"
        "t.TaskManager = lambda **options: right(include_defaults=False, **options)\n"
        "sys.argv[0] = 'lm_eval'\nmain()"
    )
    done: subprocess.CompletedProcess[str] = python(
        code, tmp_path, "--model", "cushion", "--model_args", f"bundle={planted_bundle.bundle}", "--tasks", "pick.yaml"
    )
    assert done.returncode == 0, done.stderr
    assert "|tiny_pick|" in done.stdout
    assert "|acc" in done.stdout


def test_help_loads_nothing_heavy(python: Any) -> None:
    done = python(
        "import sys\nfrom cushion_deploy.cli.main import run\nassert run(['eval', '--help']) == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    assert done.returncode == 0
    assert "--task-data" in done.stdout
    assert not {name.partition(".")[0] for name in done.stderr.split()} & HEAVY
