"""Bad input, damage, interruption: each with its exit code, a hint on stderr, no traceback, and nothing half done."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy import errors
from cushion_deploy.calib.corpora import HUB_CORPORA
from cushion_deploy.core.scales import ESTIMATORS
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.families import FAMILIES

FILES = (
    "chat_template.jinja",
    "config.json",
    "cushion.json",
    "engines/onnxruntime/engine.json",
    "export.json",
    "genai_config.json",
    "generation_config.json",
    "model.onnx",
    "model.onnx.data",
    "prefix.safetensors",
    "report/magnitudes.png",
    "report/perplexity.png",
    "report/report.html",
    "report/report.json",
    "report/scales.png",
    "report/stages.png",
    "scales.json",
    "smoothing.safetensors",
    "text.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# A child that runs the command line and stands still in the middle of a task.
STAND_STILL = """
import sys, time
import cushion_deploy.cli.progress as progress
from cushion_deploy.cli.main import main
task = sys.argv.pop(1)
def report(self, name, done, total, note=""):
    if task in name and done:
        print("reached", flush=True)
        time.sleep(120)
progress._LineReport.__call__ = report
main()
"""


def expect(result: Any, code: int, *words: str) -> None:
    """Check exit code and words, that a hint stands behind an arrow, and that nothing else was printed."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("  -> ")
    assert len(lines[-1]) > 8
    for word in words:
        assert word in result.err


@pytest.fixture
def build(cli: Any, tiny_folder: Path, small: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that tries to build the random Llama, or another model, into ``tmp_path / "out"``."""

    def attempt(*more: object, model: object = tiny_folder) -> Any:
        options = ["--model", model, *small, "--engine", "onnxruntime", "--work-dir", tmp_path / "work"]
        return cli("build", *options, "--output", tmp_path / "out", "--quiet", *more)

    return attempt


def changed_config(folder: Path, source: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_no_model(cli: Any, tmp_path: Path) -> None:
    expect(cli("build", "--output", tmp_path / "o", "--work-dir", tmp_path / "w"), 2, "no model", "--model")


def test_a_model_that_is_no_decoder(build: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = changed_config(tmp_path / "m", tiny_folder, architectures=["BertForMaskedLM"], model_type="bert")
    expect(build(model=model), 2, "BertForMaskedLM", "ForCausalLM")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder(build: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = changed_config(tmp_path / "m", tiny_folder, is_encoder_decoder=True)
    expect(build(model=model), 2, "not a decoder-only")


def test_an_unknown_family_lists_the_known(build: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = changed_config(tmp_path / "m", tiny_folder, architectures=["MambaForCausalLM"], model_type="mamba")
    expect(build(model=model), 2, "mamba", *(t for f in FAMILIES.values() for t in f.model_types))


def test_a_missing_gguf(build: Any, tmp_path: Path) -> None:
    expect(build(model=tmp_path / "gone.gguf"), 2, "gone.gguf", "does not exist", ".gguf")


def test_a_mistyped_path_names_what_is_beside_it(build: Any, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2.Q4_1.gguf").touch()
    expect(
        build(model=tmp_path / "SmolLM.Q4_1.gguf"), 2, "does not exist", f"did you mean {tmp_path}/SmolLM2.Q4_1.gguf?"
    )


def test_a_folder_that_is_no_model(cli: Any, tmp_path: Path) -> None:
    expect(cli("build", tmp_path), 2, f"folder '{tmp_path}' has no config.json")
    (tmp_path / "m.gguf").touch()
    expect(cli("build", tmp_path), 2, f"give {tmp_path}/m.gguf")
    (tmp_path / "config.json").touch()
    (tmp_path / "cushion.json").touch()
    expect(cli("build", tmp_path), 2, "is a bundle, not a model", "the model that it was built from")


def test_a_model_may_be_given_by_position_but_only_once(cli: Any, tmp_path: Path) -> None:
    expect(cli("build"), 2, "no model was given")
    expect(cli("build", tmp_path / "a.gguf"), 2, "a.gguf", "does not exist")
    expect(cli("build", "a.gguf", "--model", "b.gguf"), 2, "two models were given: a.gguf and b.gguf")


def test_a_mistyped_command_names_the_one_that_was_meant(cli: Any) -> None:
    expect(cli("biuld"), 2, "there is no command 'biuld'", "did you mean `cushion-deploy build`?")
    expect(cli("qqqq"), 2, "`cushion-deploy --help` lists them")


@pytest.mark.parametrize("length", [4, 24, 200])
def test_a_truncated_gguf(build: Any, tmp_path: Path, length: int) -> None:
    from gguf import GGUFWriter

    whole = tmp_path / "whole.gguf"
    writer = GGUFWriter(whole, "llama")
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:length])
    expect(build(model=tmp_path / "cut.gguf"), 4, "cut.gguf", "truncated", "download")


def test_a_file_that_only_has_the_suffix(build: Any, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 and more")
    expect(build(model=tmp_path / "m.gguf"), 2, "not a GGUF file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_checkpoint_is_never_opened(build: Any, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(tiny_folder / "config.json", folder)
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    expect(build(model=folder), 4, name, "safetensors")
    expect(build(model=folder / name), 4, name, "safetensors")


def test_an_unknown_precision_lists_the_known(build: Any) -> None:
    expect(build("--precision", "w3a3"), 2, "w3a3", *PRECISIONS)


def test_an_unknown_engine_lists_the_known(build: Any, cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    expect(build("--engine", "warp"), 2, "warp", *ENGINES)
    expect(
        cli("engine", tiny_bundle.bundle, "--engine", "warp", "--output", tmp_path / "e"),
        2,
        "warp",
        *ENGINES,
    )
    expect(cli("generate", tiny_bundle.bundle, "a", "--engine", "warp"), 2, "warp", "onnxruntime")


def test_an_unknown_estimator_lists_the_known(build: Any) -> None:
    expect(build("--estimator", "median"), 2, "median", *ESTIMATORS)


def test_an_unknown_objective_lists_the_known(build: Any) -> None:
    expect(build("--objective", "least"), 2, "least", "error", "max")


@pytest.mark.parametrize("option", ["--calib-data", "--eval-data"])
def test_an_unknown_data_set_lists_the_known(build: Any, tmp_path: Path, option: str) -> None:
    expect(build(option, "nowhere"), 2, "nowhere", "self", ".parquet", *HUB_CORPORA)
    assert not (tmp_path / "out").exists()


def test_calibration_text_shorter_than_one_window(build: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox.")
    expect(build("--calib-data", tmp_path / "short.txt", "--no-prefix"), 2, "short.txt", "window of 64")
    expect(build("--calib-data", tmp_path / "short.txt"), 2, "short.txt", "more text")


@pytest.mark.parametrize("name", ["search.tua", "tau", "search", "nonsense"])
def test_an_unknown_setting(build: Any, name: str) -> None:
    expect(build("--set", f"{name}=1"), 2, name, "search")


def test_a_setting_without_a_value_or_of_the_wrong_kind(build: Any) -> None:
    expect(build("--set", "search.tau"), 2, "search.tau", "=")
    expect(build("--set", "search.tau=many"), 2, "search.tau", "many")
    expect(build("--set", "search.tau=[1"), 2, "search.tau")


@pytest.mark.parametrize("text", ["search: {tua: 1}", "model: [", "- a list"])
def test_a_recipe_that_is_none(build: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    expect(build("--recipe", tmp_path / "r.yaml"), 2)
    expect(build("--recipe", tmp_path / "missing.yaml"), 2, "missing.yaml")


def test_an_output_folder_that_is_not_ours_is_left_alone(build: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    expect(build(), 2, "not a bundle of ours", "another output folder")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("verb", ["export", "engine"])
def test_a_graph_or_engine_folder_with_content_is_left_alone(
    cli: Any, tiny_bundle: Any, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    what = tiny_bundle.options if verb == "export" else [tiny_bundle.bundle, "--engine", "onnxruntime"]
    expect(cli(verb, *what, "--output", tmp_path), 2, "not an empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_no_disk_space(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    expect(build(), 2, "not enough disk space", "1.0 kB free")
    assert not (tmp_path / "out").exists()


def test_onnxruntime_asked_for_but_not_installed(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("onnxruntime"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    expect(build(), 3, "onnxruntime", "pip install 'cushion-deploy[cpu]'")


def test_tensorrt_rtx_asked_for_but_not_installed(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cushion_deploy.engines import registry
    from cushion_deploy.engines.tensorrt.engine import TensorRt
    from cushion_deploy.engines.tensorrt.flavours import RTX

    absent = TensorRt(dataclasses.replace(RTX, module="tensorrt_rtx_is_not_here"))
    monkeypatch.setitem(registry.ENGINES, "tensorrt-rtx", absent)
    expect(build("--engine", "tensorrt-rtx"), 3, "pip install 'cushion-deploy[rtx]'")


def test_generate_without_onnxruntime(cli: Any, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expect(cli("generate", tiny_bundle.bundle, "a"), 3, "pip install 'cushion-deploy[cpu]'")


def test_the_list_of_files_is_complete(tiny_bundle: Any) -> None:
    found = (p.relative_to(tiny_bundle.bundle).as_posix() for p in tiny_bundle.bundle.rglob("*") if p.is_file())
    # Nothing reads the model card, so it may be edited.
    assert sorted(found) == sorted((*FILES, "README.md"))


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_before_an_engine_sees_a_byte(
    cli: Any, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import onnxruntime

    def forbidden(*_: Any, **__: Any) -> None:
        pytest.fail("an engine was invoked")

    monkeypatch.setattr(onnxruntime, "InferenceSession", forbidden)
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle.bundle, bundle)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (bundle / name).write_bytes(data)
    for verb, *more in (
        ("verify",),
        ("inspect",),
        ("report",),
        ("generate", "a", "--max-new-tokens", "1"),
        ("parity", "--work-dir", str(tiny_bundle.work)),
        ("engine", "--engine", "onnxruntime", "--output", str(tmp_path / "e")),
    ):
        expect(cli(verb, bundle, *more), 4, Path(name).name)
        assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("verb", ["verify", "inspect", "report", "generate", "parity"])
def test_a_path_that_is_no_bundle(cli: Any, tmp_path: Path, verb: str) -> None:
    more = ("a",) if verb == "generate" else ()
    expect(cli(verb, tmp_path / "gone", *more), 2, "gone")
    assert cli(verb, tmp_path, *more).code == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_leaves_no_bundle_and_the_next_run_goes_on(
    cli: Any, start: Any, planted_folder: Path, small: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    options = ["--model", planted_folder, *small, "--work-dir", tmp_path / "work"]
    command = ["build", *options, "--engine", "onnxruntime", "--output", output]
    for task in ("scoring candidates", "observing Sites"):
        with start(STAND_STILL, task, *command) as process:
            try:
                assert process.stdout.readline() == "reached\n"
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        assert out == ""
        assert "run the same command again" in err
        assert "Traceback" not in err
        assert [p.name for p in tmp_path.iterdir()] == ["work"]
    done = cli(*command, "--json", "--quiet")
    assert done.code == 0, done.err
    assert {s["stage"]: s["reused"] for s in done.json["stages"]}["search"] is True
    assert cli("verify", output).code == 0


# A child whose command is stopped in a library that turns what the signal raised into an error of its own.
TURNED_AROUND = """
import os, sys
import cushion_deploy.cli.verify as verify
from cushion_deploy.cli.main import main
number = int(sys.argv.pop(1))
def shape_of(_):
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        raise ValueError("could not determine the shape") from None
verify.verify_bundle = shape_of
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_turns_into_an_error_stops_all_the_same(
    start: Any, tmp_path: Path, number: int, code: int
) -> None:
    with start(TURNED_AROUND, int(number), "verify", tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.strip() in ("interrupted", "terminated")


def test_an_unexpected_exception_is_a_bug(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cushion_deploy.cli.verify as verify

    def broken(_: Path) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(verify, "verify_bundle", broken)
    done = cli("verify", tmp_path)
    assert (done.code, done.out) == (70, "")
    assert "RuntimeError: boom" in done.err
    assert "please report it" in done.err


@pytest.mark.parametrize("arguments", [["bulid"], ["verify"], ["verify", "--loud"], ["build", "--seed", "x"]])
def test_a_command_line_that_is_none(cli: Any, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "error: " in done.err.lower()
    assert "Traceback" not in done.err


def test_a_reader_that_goes_away_is_neither_done_nor_a_failed_check(start: Any, tiny_bundle: Any) -> None:
    with start("from cushion_deploy.cli.main import main; main()", "inspect", tiny_bundle.bundle) as process:
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.parametrize(("module", "extra"), [("torch", "build"), ("onnx_ir", "build"), ("matplotlib", "report")])
def test_a_build_without_an_extra_says_at_once_what_to_install(
    cli: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    real = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == module else real(name))
    done = cli("build", "--model", tiny_folder, "--output", tmp_path / "out", "--work-dir", tmp_path / "work")
    assert done.code == 3
    assert f"pip install 'cushion-deploy[{extra}]'" in done.err
    assert not (tmp_path / "work").exists()


def test_scoring_the_calibration_text_is_refused(cli: Any, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 500)
    same = ["--calib-data", text, "--eval-data", text]
    done = cli("build", "--model", tiny_folder, *same, "--output", tmp_path / "o", "--work-dir", tmp_path / "w")
    assert done.code == 2
    assert "is also the calibration text" in done.err


def test_a_graph_that_is_not_what_was_exported_reaches_no_engine(
    cli: Any, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "export.json"):
        (folder / name).write_bytes((tiny_bundle.bundle / name).read_bytes())
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("an engine saw the graph"))
    done = cli("engine", folder, "--engine", "onnxruntime", "--output", tmp_path / "engine")
    assert done.code == 4
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("expected", [True, False])
def test_an_error_does_not_control_the_terminal(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: bool
) -> None:
    text = "\x1b]0;owned\x07\u200f"

    def failing(path: Path) -> None:
        raise errors.UntrustedArtifact(text, hint=text) if expected else ValueError(text)

    monkeypatch.setattr("cushion_deploy.cli.verify.verify_bundle", failing)
    done = cli("verify", tmp_path)
    assert done.code == (4 if expected else 70)
    assert not set(done.err) & set("\x1b\x07\u200f")
    assert done.err.count("‹U+001B›]0;owned‹U+0007›‹U+200F›") == 2


def test_the_name_of_an_added_document_does_not_control_the_terminal(cli: Any, copy: Path) -> None:
    (copy / ".git").mkdir()
    (copy / ".git" / "\x1b[2J\u202e").write_text("")
    done = cli("verify", copy)
    assert done.code == 0, done.err
    assert ".git/‹U+001B›[2J‹U+202E› (added)" in done.out
    assert "\x1b" not in done.out
