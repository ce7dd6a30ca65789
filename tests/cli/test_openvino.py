"""OpenVINO through every verb that runs an engine, in one bundle with ONNX Runtime, whose results are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.engines.registry import find_engine, why_missing
from cushion_deploy.store import verify_bundle

SMALL = ("--prompt", "16", "--decoded", "4", "--rounds", "2", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(planted_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build for both engines, from the stages of a build for one."""
    if reason := why_missing(find_engine("openvino")):
        pytest.skip(reason.message)
    from cushion_deploy.cli.main import run

    out = tmp_path_factory.mktemp("openvino") / "bundle"
    engines = ("--engine", "onnxruntime", "--engine", "openvino")
    assert run(["build", *planted_bundle.options, *engines, "--output", str(out), "--quiet"]) == 0
    return out


def test_a_build_runs_it_and_reports_what_happened(bundle: Path) -> None:
    assert "engines/openvino/cpu.blob" in verify_bundle(bundle).files
    report = json.loads((bundle / "report" / "report.json").read_text())
    rows = {row["engine"]: row for row in report["engines"]}
    assert set(rows) == {"onnxruntime", "openvino"}
    assert all(row["ran"] and not row["note"] for row in rows.values())
    assert rows["openvino"]["int8_linears"] == rows["openvino"]["linears"] == 22
    # The two engines compute the same model: their perplexities differ by rounding.
    assert rows["openvino"]["perplexity"] == pytest.approx(report["perplexity"]["engine"], rel=0.01)
    rungs = {row["rung"]: row["passed"] for row in report["parity"]}
    assert rungs["openvino engine against fake-quant"]
    assert "perplexity" in (bundle / "report" / "report.html").read_text().partition("openvino")[2]
    for engine in rows:
        written = json.loads((bundle / "engines" / engine / "engine.json").read_text())
        assert (written["ran"], "not_run" in written["details"]) == (True, False)


def test_parity_climbs_with_the_engines_of_the_bundle_or_the_named_ones(
    cli: Any, bundle: Path, planted_bundle: Any
) -> None:
    for bundle_path, more in ((bundle, ()), (planted_bundle.bundle, ("--engine", "openvino"))):
        done = cli("parity", bundle_path, *more, "--work-dir", planted_bundle.work, "--json")
        assert done.code == 0, done.err
        assert done.json["unchecked"] == []
        assert "openvino engine against fake-quant" in {check["rung"] for check in done.json["checks"]}
    without = cli("parity", planted_bundle.bundle, "--work-dir", planted_bundle.work, "--json").json
    assert not any("openvino" in check["rung"] for check in without["checks"])


def test_parity_says_which_engine_of_the_bundle_did_not_run(
    cli: Any, bundle: Path, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.engines.openvino.engine import OpenVino
    from cushion_deploy.errors import MissingDependency

    def missing(engine: OpenVino, *_: Any, **__: Any) -> Any:
        raise MissingDependency("OpenVINO is not there", hint="install it")

    monkeypatch.setattr(OpenVino, "open", missing)
    done = cli("parity", bundle, "--work-dir", planted_bundle.work, "--json")
    assert (done.code, done.json["unchecked"]) == (0, ["openvino was not run: OpenVINO is not there"])
    named = cli("parity", bundle, "--engine", "openvino", "--work-dir", planted_bundle.work)
    assert named.code == 3
    assert "OpenVINO is not there" in named.err


def test_eval_scores_it_as_its_column(
    cli: Any, bundle: Path, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.engines.openvino.session import OpenVinoSession

    step, steps = OpenVinoSession._step, list[int]()
    monkeypatch.setattr(OpenVinoSession, "_step", lambda *arguments: steps.append(1) or step(*arguments))
    work = ("--columns", "quantized-prefix,engine", "--work-dir", planted_bundle.work, "--threads", "1")
    ours = cli("eval", bundle, *work, "--json")
    assert not steps
    theirs = cli("eval", bundle, *work, "--engine", "openvino", "--json")
    assert (ours.code, theirs.code) == (0, 0), theirs.err
    assert (ours.json["engine"], theirs.json["engine"]) == ("onnxruntime", "openvino")
    (row,), (other) = theirs.json["texts"], ours.json["texts"][0]
    found, expected = (each["columns"]["engine"]["perplexity"] for each in (row, other))
    assert found == pytest.approx(expected, rel=0.01)
    assert steps
    assert theirs.json["agreement"][0]["passed"]
    table = cli("eval", bundle, *work, "--engine", "openvino").out
    assert table.splitlines()[0].split()[-1] == "openvino"
    alone = cli("eval", bundle, "--columns", "quantized-prefix", "--engine", "openvino")
    assert alone.code == 2
    assert "the column 'engine' is not evaluated" in alone.err


def test_generate_writes_the_same_tokens(cli: Any, bundle: Path) -> None:
    greedy = ("A few semantically", "--max-new-tokens", "8", "--threads", "1", "--json")
    ours, theirs = (cli("generate", bundle, *greedy, "--engine", name) for name in ("onnxruntime", "openvino"))
    assert theirs.code == 0, theirs.err
    assert theirs.json["token_ids"] == ours.json["token_ids"]


def test_bench_times_it_beside_its_own_float_twin(cli: Any, bundle: Path, planted_bundle: Any) -> None:
    found = cli("bench", bundle, "--work-dir", planted_bundle.work, *SMALL, "--json").json
    names = {f"{engine}, {kind}" for engine in ("onnxruntime", "openvino") for kind in ("INT8", "float32")}
    assert set(found["engines"]) == names
    assert set(found["int8_against_float"]) == {"onnxruntime", "openvino"}
    assert all(row["peak_memory_bytes"] > row["file_bytes"] > 0 for row in found["engines"].values())
    named = cli("bench", planted_bundle.bundle, "--engine", "openvino", "--no-float", *SMALL, "--json").json
    assert set(named["engines"]) == {"onnxruntime, INT8", "openvino, INT8"}
    unknown = cli("bench", planted_bundle.bundle, "--engine", "openvina", "--no-float", *SMALL)
    assert unknown.code == 2
    assert "unknown engine 'openvina'" in unknown.err


def test_it_is_added_to_a_bundle_and_its_old_checks_are_dropped(
    cli: Any, bundle: Path, planted_bundle: Any, tmp_path: Path
) -> None:
    work = ("--work-dir", tmp_path / "w")
    for source in (planted_bundle.bundle, bundle):
        out = tmp_path / source.parent.name
        done = cli("engine", source, "--engine", "openvino", *work, "-o", out, "--json")
        assert done.code == 0, done.err
        assert (done.json["ran"], done.json["int8_linears"]) == (True, 22)
        assert verify_bundle(out)
        rungs = {row["rung"] for row in cli("report", out, "--json").json["parity"]}
        assert "onnxruntime engine against fake-quant" in rungs
        assert "openvino engine against fake-quant" not in rungs
