"""The verbs of single stages, on their own and on each other's output; `parity`; and what help says of them all."""

from __future__ import annotations

import ast
import inspect
import json
import platform
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
import torch
from junitparser import JUnitXml
from safetensors.numpy import load_file

from cushion_deploy.cli.main import VERBS
from cushion_deploy.recipe import Recipe
from cushion_deploy.store import publish, staging_area, verify_bundle
from cushion_deploy.store.manifest import tool_version

PACKAGE = Path(__file__).parents[2] / "cushion_deploy"
COMMANDS: dict[str, click.Command] = {verb: import_module(f"cushion_deploy.cli.{verb}").command for verb in VERBS}


def test_search_writes_the_prefix_that_the_build_found(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli("search", *planted_bundle.options, "--output", tmp_path / "p.safetensors", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    tensors = load_file(tmp_path / "p.safetensors")
    for name, expected in load_file(planted_bundle.bundle / "prefix.safetensors").items():
        np.testing.assert_array_equal(tensors[name], expected)
    assert tensors["token_ids"].tolist() == done.json["token_ids"]
    # Layers, key-value heads, positions, head dimension.
    assert tensors["keys"].shape == tensors["values"].shape == (3, 2, len(done.json["token_ids"]), 16)


def test_search_explains_its_steps(cli: Any, planted_bundle: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    found = cli("search", *planted_bundle.options, "--output", tmp_path / "p.safetensors")
    assert "accepted" in found.out
    assert "stopped because" in found.out
    none = cli("search", *tiny_bundle.options, "--output", tmp_path / "e.safetensors")
    assert none.code == 0
    assert "empty prefix" in none.out
    assert "1.00 of the objective remains without the attention sinks" in " ".join(none.out.split())
    assert load_file(tmp_path / "e.safetensors")["keys"].shape[2] == 0


def test_search_without_a_prefix(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli("search", *planted_bundle.options, "--no-prefix", "--output", tmp_path / "p.safetensors", "--json")
    assert (done.code, done.json) == (0, {"token_ids": []})
    assert load_file(tmp_path / "p.safetensors")["token_ids"].size == 0


def test_each_verb_works_on_the_output_of_the_one_before(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    options, bundle = planted_bundle.options, planted_bundle.bundle
    prefix, scales, graph, engine = (tmp_path / n for n in ("p.safetensors", "s.json", "graph", "engine"))
    assert cli("search", *options, "--output", prefix).code == 0
    done = cli("calibrate", *options, "--prefix", prefix, "--output", scales, "--json")
    assert (done.code, done.json) == (0, json.loads(scales.read_text()))
    assert scales.read_bytes() == (bundle / "scales.json").read_bytes()
    files = ["--prefix", prefix, "--scales", scales, "--smoothing", tmp_path / "smoothing.safetensors"]
    done = cli("export", *options, *files, "--output", graph, "--json")
    assert done.code == 0, done.err
    assert {p.name for p in graph.iterdir()} == {"model.onnx", "model.onnx.data", "export.json"}
    assert (graph / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    done = cli("engine", graph, "--engine", "onnxruntime", "--output", engine, "--json")
    assert done.code == 0, done.err
    assert (done.json["linears"], done.json["int8_linears"]) == (22, 22)
    assert (engine / "engine.json").is_file()


def test_a_finished_stage_is_not_shared_with_what_export_wrote(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli("export", *planted_bundle.options, "--output", tmp_path / "g")
    assert done.code == 0
    assert re.search(r"rules checked: 12, on \d{3,} nodes and tensors$", done.out, re.MULTILINE)
    assert (tmp_path / "g" / "model.onnx").stat().st_nlink == 1


def test_export_of_the_float_twin_has_no_quantizer(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    import onnx

    done = cli("export", *planted_bundle.options, "--float", "--output", tmp_path / "g")
    assert done.code == 0, done.err
    assert "floating-point twin" in done.out
    assert "rules checked: 0\n" in done.out
    operators = {n.op_type for n in onnx.load(tmp_path / "g" / "model.onnx", load_external_data=False).graph.node}
    assert "MatMul" in operators
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}


def test_the_float_twin_of_an_int8_cache_has_a_float_cache(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    import onnx

    done = cli("export", *planted_bundle.options, "--float", "--kv-cache", "int8", "--output", tmp_path / "g", "--json")
    assert done.code == 0, done.err
    graph = onnx.load(tmp_path / "g" / "model.onnx", load_external_data=False).graph
    assert not {n.op_type for n in graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert {i.type.tensor_type.elem_type for i in graph.input if "past" in i.name} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("verb", ["calibrate", "tune", "export"])
def test_a_foreign_prefix_is_refused_before_any_work(
    cli: Any, planted_bundle: Any, tiny_bundle: Any, tmp_path: Path, verb: str
) -> None:
    foreign = ("--prefix", planted_bundle.bundle / "prefix.safetensors", "--work-dir", tmp_path / "w")
    done = cli(verb, *tiny_bundle.options, *foreign, "--output", tmp_path / "g")
    assert (done.code, done.out) == (2, "")
    assert "the prefix was made for another model" in done.err
    assert "cushion-deploy search" in done.err
    assert not list((tmp_path / "w").glob("stages/*"))
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("kind", ["prefix", "scales"])
def test_what_belongs_to_another_model_is_refused(
    cli: Any, planted_bundle: Any, tiny_bundle: Any, tmp_path: Path, kind: str
) -> None:
    name = {"prefix": "prefix.safetensors", "scales": "scales.json"}[kind]
    other = planted_bundle.bundle / name
    done = cli("export", *tiny_bundle.options, f"--{kind}", other, "--output", tmp_path / "g")
    assert done.code == 2, (done.out, done.err)
    assert "another model" in done.err
    assert not (tmp_path / "g").exists()


def test_scales_behind_another_prefix_are_refused(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    files = ["--scales", planted_bundle.bundle / "scales.json"]
    files += ["--smoothing", planted_bundle.bundle / "smoothing.safetensors"]
    done = cli("export", *planted_bundle.options, "--no-prefix", *files, "--output", tmp_path / "g")
    assert done.code == 2, (done.out, done.err)
    assert "another prefix" in done.err


def test_inspect_shows_a_bundle_a_prefix_and_scales(cli: Any, planted_bundle: Any) -> None:
    bundle = planted_bundle.bundle
    report = json.loads((bundle / "report" / "report.json").read_text())
    shown = cli("inspect", bundle, "--json").json
    assert (shown["linears in the graph"], shown["MatMuls after packing"]) == (22, 13)
    assert shown["files"] == len(verify_bundle(bundle).files)
    assert shown["engines"] == ["onnxruntime"]
    assert shown["end tokens"] == ["2 </s>"]
    prefix = cli("inspect", bundle / "prefix.safetensors", "--json").json
    assert prefix["token ids"] == report["search"]["token_ids"]
    assert prefix["largest key"] == float(np.abs(load_file(bundle / "prefix.safetensors")["keys"]).max())
    scales = cli("inspect", bundle / "scales.json", "--json").json
    values = json.loads((bundle / "scales.json").read_text())["scales"].values()
    assert (scales["smallest scale"], scales["largest scale"]) == (min(values), max(values))
    assert "largest key" in cli("inspect", bundle / "prefix.safetensors").out
    assert cli("inspect", bundle / "model.onnx").code == 2


def test_report_shows_and_prints_the_report(cli: Any, planted_bundle: Any) -> None:
    file = planted_bundle.bundle / "report" / "report.json"
    assert cli("report", planted_bundle.bundle, "--json").json == json.loads(file.read_text())
    shown = cli("report", planted_bundle.bundle)
    assert shown.code == 0
    assert "perplexity" in shown.out
    assert str(planted_bundle.bundle / "report" / "report.html") in shown.out


def test_verify_names_the_manifest(cli: Any, planted_bundle: Any) -> None:
    done = cli("verify", planted_bundle.bundle)
    assert (done.code, done.err) == (0, "")
    assert verify_bundle(planted_bundle.bundle).digest in done.out
    shown = cli("verify", planted_bundle.bundle, "--json").json
    assert set(shown["files"]) == set(verify_bundle(planted_bundle.bundle).files)


def test_no_digest_of_a_bundle_is_cached(
    cli: Any, planted_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSHION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("cushion_deploy.store.digest_cache.SETTLED_NS", -1_000_000_000)
    bundle, model = planted_bundle.bundle, Path(planted_bundle.options[1])
    for arguments in (("verify", bundle), ("inspect", bundle), ("generate", bundle, "a", "--max-new-tokens", "1")):
        assert cli(*arguments).code == 0
    assert not (tmp_path / "cache").exists()
    # The model that a bundle was built from is cached, its configuration and weights at least.
    assert cli("parity", bundle, "--work-dir", planted_bundle.work, "--reuse").code == 0
    cached = [Path(name) for name in json.loads((tmp_path / "cache" / "digests.json").read_text())["files"]]
    assert {"config.json", "model.safetensors"} <= {file.name for file in cached}
    assert {file.parent for file in cached} == {model}


def test_parity_of_a_bundle(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    junit = tmp_path / "parity.xml"
    done = cli("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--junit", junit, "--json")
    assert done.code == 0, done.err
    checks = done.json["checks"]
    assert all(c["passed"] for c in checks)
    assert len({c["rung"] for c in checks}) >= 5
    (suite,) = JUnitXml.fromfile(str(junit))
    assert (suite.tests, suite.failures) == (len(checks), 0)


def test_parity_against_a_baseline(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    parity = ("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--reuse")
    file = tmp_path / "baseline.json"
    assert cli(*parity, "--write-baseline", file).code == 0
    same = cli(*parity, "--baseline", file, "--json")
    assert same.code == 0
    rungs = [check["rung"] for check in same.json["checks"]]
    assert sum(rung.startswith("baseline: ") for rung in rungs) == len(rungs) / 2
    strict = json.loads(file.read_text())
    for check in strict["checks"]:
        if check["metric"].startswith("identical INT8 codes"):
            check.update(value=2.0, tolerance=0.0)
    file.write_text(json.dumps(strict))
    worse = cli(*parity, "--baseline", file)
    assert worse.code == 1
    assert "FAIL baseline: " in worse.out
    assert cli(*parity, "--baseline", tmp_path / "nothing.json").code == 2


def test_parity_for_a_person_reuses_the_build(cli: Any, planted_bundle: Any) -> None:
    done = cli("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--reuse")
    assert (done.code, done.err) == (0, ""), "a stage ran again: it reported progress"
    assert "FAIL" not in done.out
    assert done.out.splitlines()[-1] == "passed on 64 tokens of eval.txt; the result of an earlier run"


def test_parity_against_another_model(cli: Any, planted_bundle: Any, tiny_folder: Path) -> None:
    done = cli("parity", planted_bundle.bundle, "--model", tiny_folder, "--work-dir", planted_bundle.work)
    assert (done.code, done.out) == (2, "")
    assert "not the model that the bundle was built from" in done.err
    original = verify_bundle(planted_bundle.bundle).recipe["model"]
    assert f"give the original model with --model; the bundle's recipe names it {original}" in done.err


def test_an_interrupted_ladder_promises_nothing(cli: Any, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("cushion_deploy.verbs.parity.climb", interrupted)
    done = cli("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work)
    assert (done.code, done.err.splitlines()[-1]) == (130, "interrupted")


def test_parity_says_what_is_wrong_with_what_was_given(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    call = ("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work)
    absent = cli(*call, "--model", tmp_path / "gone")
    assert (absent.code, "built from" in absent.err) == (2, False), "the given model is absent, not the bundle's"
    device = cli(*call, "--device", "cuda:99")
    assert (device.code, "--model" in device.err) == (2, False), "the device is to blame, not the model"
    for option in ("--junit", "--write-baseline"):
        folder = cli("parity", planted_bundle.bundle, "--work-dir", tmp_path / "work", option, tmp_path)
        assert (folder.code, "is a folder, expected the name of a file" in folder.err) == (2, True)
        assert not (tmp_path / "work").exists(), "found before the ladder runs"


def test_parity_names_the_first_site_of_a_sabotaged_scale(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    site, bundle, junit = "layers.1.mlp.down", tmp_path / "b", tmp_path / "parity.xml"
    manifest = verify_bundle(planted_bundle.bundle)
    with staging_area(bundle) as staged:
        for name in manifest.files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(planted_bundle.bundle / name, staged / name)
        scales = json.loads((staged / "scales.json").read_text())
        scales["scales"] = {k: v * 1.5 if k == site else v for k, v in scales["scales"].items()}
        (staged / "scales.json").write_text(json.dumps(scales))
        publish(staged, bundle, manifest.recipe, manifest.parents)
    done = cli("parity", bundle, "--work-dir", planted_bundle.work, "--junit", junit)
    assert done.code == 1, done.err
    failed = [line for line in done.out.splitlines() if line.startswith("FAIL ")]
    named = re.findall(r"first diverging Site: (\S+)", "\n".join(failed))
    assert named
    # Each Site is fed the reference's codes, so the damage shows in what enters the next one.
    assert set(named) <= {site, "layers.2.attn.qkv"}
    assert done.out.splitlines()[-1].startswith("FAILED")
    (suite,) = JUnitXml.fromfile(str(junit))
    assert suite.failures == len(failed)
    assert named[0] in junit.read_text()


def test_help_lists_every_verb(cli: Any) -> None:
    shown = cli("--help")
    assert shown.code == 0
    for verb, words in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(words)}", shown.out, re.MULTILINE)
    assert "Exit codes" in shown.out


def test_the_version_has_what_a_bug_report_needs(cli: Any) -> None:
    shown = cli("--version")
    assert shown.code == 0
    first, second, *libraries = shown.out.splitlines()
    assert first == f"cushion-deploy, version {tool_version()}"
    assert platform.python_version() in second
    assert platform.machine() in second
    found = dict(line.split(" ", 1) for line in libraries)
    assert torch.__version__.startswith(found["torch"])  # which may add the build, as in +cu130
    assert found["onnxruntime"] == onnxruntime.__version__
    assert {"tensorrt", "tensorrt-rtx"} <= set(found)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_speaks_to_a_newcomer(cli: Any, verb: str) -> None:
    shown = cli(verb, "--help")
    assert (shown.code, shown.err) == (0, "")
    command = COMMANDS[verb]
    assert command.help
    assert command.help.split("\n")[0].endswith((".", ":"))
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "help":
            words = option.help or ""
            assert words, f"{verb} {option.opts[0]} says nothing of itself"
            assert words.endswith("."), f"{verb} {option.opts[0]}: {words}"
        elif isinstance(option, click.Argument):
            assert (option.metavar or str(option.name).upper()).strip("[]") in command.help


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_of_a_verb_is_dead(verb: str) -> None:
    from cushion_deploy.cli import bundle_options, generation_options, options

    source = [inspect.getsource(import_module(f"cushion_deploy.cli.{verb}"))]
    used = set()
    if "make_recipe" in source[0]:
        source.append(inspect.getsource(options.make_recipe))
        used |= set(options.FLAGS)
    if "make_params" in source[0]:
        source.append(inspect.getsource(generation_options.make_params))
    if "@signature_options" in source[0]:
        source.append(inspect.getsource(bundle_options.signature_options))
    nodes = [node for text in source for node in ast.walk(ast.parse(text))]
    # An option names its parameter in its declaration too, which is no use of it.
    declared = {
        id(argument)
        for n in nodes
        if isinstance(n, ast.Call) and re.search(r"(option|argument)$", ast.unparse(n.func))
        for given in n.args
        for argument in ast.walk(given)
    }
    used |= {n.id for n in nodes if isinstance(n, ast.Name)}
    used |= {n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in declared}
    for parameter in COMMANDS[verb].params:
        assert parameter.name in used, f"{verb}: {parameter.name} is never used"


def test_no_setting_of_the_recipe_is_dead() -> None:
    files = (p for p in PACKAGE.glob("**/*.py") if not {"recipe", "cli"} & set(p.parts))
    text = "\n".join(p.read_text() for p in files)
    text += "\n".join(
        p.read_text() for name in ("calib", "export", "engines") for p in (PACKAGE / name).glob("**/*.py")
    )
    for setting in Recipe.settings():
        last = setting.name.rpartition(".")[2]
        assert re.search(rf"\.{last}\b", text), f"{setting.name} is never used"


def test_export_takes_the_files_of_one_calibration(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    options = (*tiny_bundle.options, "--kv-cache", "int8", "--work-dir", tmp_path / "w", "--quiet")
    made = cli("calibrate", *options, "--output", tmp_path / "scales.json")
    assert made.code == 0, made.err
    files = {name: tmp_path / f"{name}.json" for name in ("scales", "kv_scales")}
    given = ("--scales", files["scales"], "--kv-scales", files["kv_scales"])
    smoothing = tmp_path / "smoothing.safetensors"
    given += ("--smoothing", smoothing) if smoothing.exists() else ()
    done = cli("export", *options, *given, "--output", tmp_path / "g", "--json")
    assert done.code == 0, done.err
    read = json.loads(files["kv_scales"].read_text())
    assert json.loads((tmp_path / "g" / "kv_scales.json").read_text()) == read
    assert done.json["contract"]["quantized_cache"]
    # One without the other would mix two calibrations.
    alone = cli("export", *options, "--scales", files["scales"], "--output", tmp_path / "h")
    assert alone.code == 2
    assert "--scales was given without --kv-scales" in alone.err
    files["kv_scales"].write_text(json.dumps({**read, "corpus_digest": "0" * 64}))
    other = cli("export", *options, *given, "--output", tmp_path / "h")
    assert other.code == 2
    assert "calibrated under another text" in other.err


def test_a_study_refuses_an_int8_cache(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    model = tiny_bundle.options[list(tiny_bundle.options).index("--model") + 1]
    done = cli("study", model, "--set", "export.kv_cache=int8", "--output", tmp_path / "s")
    assert done.code == 2
    assert "needs a floating-point key/value cache" in done.err
