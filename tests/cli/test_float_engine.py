"""`onnxruntime-cuda` from the command line: compiled anywhere, and run here with its settings on the CPU provider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.onnxruntime.settings import CPU, Provider
from cushion_deploy.engines.registry import ENGINES

NAME = "onnxruntime-cuda"
SAID = "multiplies float16 values of the INT8 codes"


@pytest.fixture(scope="module")
def compiled(cli: Any, planted_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of the planted model with the float16 graph added."""
    out = tmp_path_factory.mktemp("float") / "bundle"
    done = cli("engine", planted_bundle.bundle, "--engine", NAME, "--output", out, "--work-dir", planted_bundle.work)
    assert done.code == 0, done.err
    assert "linears multiply float16 values of the INT8 codes" in done.out
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine run: the same settings and the bound cache, on the CPU provider."""
    provider = Provider(NAME, CPU.name, "install it", "cpu", multiplies_floats=True)
    monkeypatch.setitem(ENGINES, NAME, OnnxRuntime(provider))


def test_the_bundle_says_what_it_runs_and_that_it_was_not_run(cli: Any, compiled: Path) -> None:
    found = cli("inspect", compiled, "--json").json
    assert found[NAME].startswith("cuda; ")
    assert found[NAME].endswith("linears multiply float16 values of the INT8 codes")
    report = json.loads((compiled / "report" / "report.json").read_text())
    (row,) = (engine for engine in report["engines"] if engine["engine"] == NAME)
    assert (row["int8_linears"], row["ran"]) == (0, False)
    assert report["plan_type"]["dtype"] == "float16"
    assert cli("verify", compiled).code == 0


def test_without_the_provider_it_is_an_error_with_the_install_command(cli: Any, compiled: Path) -> None:
    if "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    done = cli("generate", compiled, "abc", "--engine", NAME)
    assert done.code == 3
    assert "cushion-deploy[gpu]" in done.err


@pytest.mark.usefixtures("here")
def test_generating_says_what_is_multiplied(cli: Any, compiled: Path, planted_bundle: Any) -> None:
    options = ("abc", "--max-new-tokens", 4, "--json")
    done = cli("generate", compiled, *options, "--engine", NAME)
    assert done.code == 0, done.err
    assert f"[{NAME}: {SAID}]" in done.err
    assert len(done.json["token_ids"]) == 4
    assert cli("generate", compiled, *options).err == "", "nothing to say on the default engine"
    # Without a graph of its own the engine runs model.onnx, and says that too.
    plain = cli("generate", planted_bundle.bundle, *options, "--engine", NAME)
    assert "multiplies float32 values of the INT8 codes" in plain.err


@pytest.mark.usefixtures("here")
def test_it_is_on_the_parity_ladder_with_the_graph_behind_it(cli: Any, compiled: Path, planted_bundle: Any) -> None:
    done = cli("parity", compiled, "--work-dir", planted_bundle.work, "--json")
    assert done.code == 0, done.out
    rungs = {check["rung"] for check in done.json["checks"]}
    assert {"float16 graph against the float32 graph", f"{NAME} engine against fake-quant"} <= rungs


@pytest.mark.usefixtures("here")
def test_bench_times_it_beside_float16_and_does_not_call_it_int8(cli: Any, compiled: Path, planted_bundle: Any) -> None:
    small = ("--prompt", "8", "--decoded", "2", "--rounds", "1")
    done = cli("bench", compiled, "--work-dir", planted_bundle.work, *small)
    assert done.code == 0, done.err
    names = {line.partition("  ")[0] for line in done.out.splitlines() if line.startswith(f"{NAME}, ")}
    assert names == {f"{NAME}, INT8 codes as float16", f"{NAME}, float16"}
    assert f"{NAME}: {SAID}" in done.out
    assert f"On {NAME}, INT8 codes as float16 " in done.out
