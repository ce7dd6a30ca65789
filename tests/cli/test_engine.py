"""`engine`: a bundle with one engine more, plans of every type, and what is refused before anything is made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cushion_deploy.engines.onnxruntime.kernels import UINT8_WEIGHTS, WAYS
from cushion_deploy.engines.onnxruntime.settings import session_config
from cushion_deploy.stages.plan_type import MeasureRange
from cushion_deploy.store import verify_bundle


def test_engine_of_a_bundle(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    more = ("--work-dir", tmp_path / "w", "--output", tmp_path / "e")
    done = cli("engine", planted_bundle.bundle, "--engine", "onnxruntime", *more)
    assert done.code == 0
    assert "22 of 22 linears in INT8" in done.out
    # The result is the bundle again, and runs.
    files = {name: entry.sha256 for name, entry in verify_bundle(planted_bundle.bundle).files.items()}
    again = {name: entry.sha256 for name, entry in verify_bundle(tmp_path / "e").files.items()}
    changed = {name for name in files if files[name] != again.get(name)}
    assert {name for name in changed if not name.startswith("report/")} <= {"engines/onnxruntime/engine.json"}
    assert cli("generate", tmp_path / "e", "The quick", "--max-new-tokens", "2").code == 0


def test_the_card_of_a_bundle_is_written_anew_unless_it_was_edited(cli: Any, copy: Path, tmp_path: Path) -> None:
    more = ("--engine", "onnxruntime", "--work-dir", tmp_path / "w")
    card = (copy / "README.md").read_text()
    licensed = card.replace("---\n", '---\nlicense: "mit"\n', 1)
    (copy / "README.md").write_text(licensed)
    assert cli("engine", copy, *more, "--output", tmp_path / "edited").code == 0
    assert (tmp_path / "edited" / "README.md").read_text() == licensed
    # It is part of the new bundle now, so its licence is carried over into a new card.
    assert cli("engine", tmp_path / "edited", *more, "--output", tmp_path / "again").code == 0
    again = ModelCard.load(tmp_path / "again" / "README.md", ignore_metadata_errors=False)
    assert again.data.license == "mit"
    assert "license" not in ModelCard(card).data.to_dict()


def test_a_plan_for_a_bundle_that_has_none(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = ("--engine", "tensorrt-rtx", "--targets", "sm89,sm86", "--max-context", 64, "--work-dir", tmp_path / "w")
    done = cli("engine", planted_bundle.bundle, *more, "--output", tmp_path / "e", "--json")
    assert done.code == 0, done.err
    assert done.json["targets"] == ["sm86", "sm89"]
    assert done.json["int8_linears"] == done.json["linears"] == 22
    assert done.json["details"]["limits"]["context"] == 64
    files = verify_bundle(tmp_path / "e").files
    assert {"engines/onnxruntime/engine.json", "engines/tensorrt-rtx/sm86+sm89.engine"} <= set(files)
    shown = cli("inspect", tmp_path / "e", "--json").json
    assert shown["onnxruntime on this machine"].startswith(WAYS[session_config()[UINT8_WEIGHTS]])
    assert shown["engines"] == ["onnxruntime", "tensorrt-rtx"]
    rows = {row["engine"]: row for row in cli("report", tmp_path / "e", "--json").json["engines"]}
    assert rows["tensorrt-rtx"]["targets"] == ["sm86", "sm89"]
    assert rows["onnxruntime"]["ran"]
    assert "sm86" in (tmp_path / "e" / "report" / "report.html").read_text()
    card = ModelCard.load(tmp_path / "e" / "README.md", ignore_metadata_errors=False).data
    assert {"onnxruntime", "tensorrt"} <= set(card.tags)
    # Nothing to run it on: an exit code of its own, and what to do.
    ran = cli("generate", tmp_path / "e", "The quick", "--engine", "tensorrt-rtx")
    assert ran.code == 3
    assert "--engine onnxruntime" in ran.err
    # Another model is not the bundle's.
    other = cli("engine", planted_bundle.bundle, *more, "--model", tmp_path, "--output", tmp_path / "f")
    assert other.code == 2
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_a_plan_of_another_type_climbs_the_ladder(
    cli: Any, planted_bundle: Any, short: str, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = ("--engine", "tensorrt-rtx", "--targets", "sm86", "--max-context", 64, "--max-prefill", 16)
    done = cli(
        "engine",
        planted_bundle.bundle,
        *more,
        "--plan-dtype",
        short,
        "--work-dir",
        tmp_path / "w",
        "-o",
        tmp_path / "e",
    )
    assert done.code == 0, done.err
    assert "22 of 22 linears in INT8" in done.out
    assert "tensorrt_rtx --onnx=" in done.out
    artifact = json.loads((tmp_path / "e" / "engines" / "tensorrt-rtx" / "engine.json").read_text())
    assert (artifact["details"]["dtype"], artifact["details"]["limits"]["prefill"]) == (dtype, 16)
    # The bundle says so too: in its recipe, to who looks at it, and by telling no parity of a graph that it has not.
    settings = verify_bundle(tmp_path / "e").recipe["tensorrt"]
    assert settings == {"dtype": dtype, "max_batch": 1, "max_context": 64, "max_prefill": 16}
    assert f"sm86; {dtype}, batch 1, context 64; prefill 16" in cli("inspect", tmp_path / "e").out
    told = {row["rung"] for row in cli("report", tmp_path / "e", "--json").json["parity"]}
    assert "canonical ONNX against fake-quant" in told
    assert not any("float16 graph" in rung for rung in told)
    assert f"cushion-deploy parity {tmp_path / 'e'}" in done.out
    climbed = cli("parity", tmp_path / "e", "--work-dir", tmp_path / "w", "--json")
    assert climbed.code == 0, climbed.err
    (unchecked,) = climbed.json["unchecked"]
    assert unchecked.startswith("tensorrt-rtx was not run: ")
    rungs = {check["rung"] for check in climbed.json["checks"]}
    assert (f"{dtype} graph against the float32 graph" in rungs) == (dtype == "bfloat16")


def test_the_type_of_a_plan_is_measured_once_and_reported(
    cli: Any, planted_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = ("--engine", "tensorrt-rtx", "--targets", "sm86", "--max-context", 64, "--max-prefill", 16)
    done = cli("engine", planted_bundle.bundle, *more, "--work-dir", tmp_path / "w", "-o", tmp_path / "e")
    assert done.code == 0, done.err
    assert "sm86; float16, batch 1" in done.out
    assert re.search(r"22 of 22 linears in INT8, attention fused \d of 3\n", done.out)
    found = cli("report", tmp_path / "e", "--json").json["plan_type"]
    assert (found["dtype"], found["wanted"]) == ("float16", "auto")
    parts = [row["part"] for row in found["values"]]
    assert [part for part in parts if part.startswith("layers.")] == [
        f"layers.{i}.{block}" for i in range(3) for block in ("attn", "mlp")
    ]
    assert f"of {found['corpus']}" in (tmp_path / "e" / "report" / "report.html").read_text()

    # The bundle now says what was measured, so another plan does not need the calibration text.
    def again(*_: Any) -> None:
        raise AssertionError("the values are in the report")

    monkeypatch.setattr(MeasureRange, "run", again)
    done = cli("engine", tmp_path / "e", *more, "--work-dir", tmp_path / "other", "-o", tmp_path / "f")
    assert done.code == 0, done.err
    assert cli("report", tmp_path / "f", "--json").json["plan_type"] == found


def test_a_float32_plan_needs_no_model(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = ("--targets", "sm86", "--max-context", 64, "--plan-dtype", "fp32", "--model", tmp_path / "nowhere")
    more += ("--work-dir", tmp_path / "w")
    done = cli("engine", planted_bundle.bundle, "--engine", "tensorrt-rtx", *more, "-o", tmp_path / "e")
    assert done.code == 0, done.err
    graph = json.loads((planted_bundle.bundle / "export.json").read_text())
    artifact = json.loads((tmp_path / "e" / "engines" / "tensorrt-rtx" / "engine.json").read_text())
    assert artifact["parents"]["graph"] == graph["digest"]


def test_an_engine_refuses_a_type_that_it_does_not_compile(cli: Any, planted_bundle: Any, tmp_path: Path) -> None:
    done = cli("engine", planted_bundle.bundle, "--engine", "onnxruntime", "--plan-dtype", "bf16", "-o", tmp_path / "e")
    assert done.code == 2
    assert "compiles float32 graphs, not bfloat16" in done.err
    missing = cli("engine", planted_bundle.bundle, "--engine", "tensorrt", "-o", tmp_path / "e")
    assert missing.code == 3
    assert "TensorRT cannot be used" in missing.err


def test_what_cannot_be_compiled_is_refused_before_anything_is_made(
    cli: Any, planted_bundle: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    rtx = ("--engine", "tensorrt-rtx", "--work-dir", tmp_path / "w")
    dry = cli("build", *planted_bundle.options, *rtx, "--targets", "foo", "--dry-run", "--output", tmp_path / "b")
    assert dry.code == 2
    assert "unknown target 'foo'" in dry.err
    assert cli("engine", planted_bundle.bundle, *rtx, "--allow-float-linears", -1, "-o", tmp_path / "e").code == 2
    inside = cli("engine", planted_bundle.bundle, *rtx, "-o", planted_bundle.bundle / "sub")
    assert inside.code == 2
    assert "is inside the bundle" in inside.err
    verify_bundle(planted_bundle.bundle)
    absent = cli("engine", planted_bundle.bundle, *rtx, "--model", tmp_path / "nowhere", "-o", tmp_path / "e")
    assert absent.code == 2
    assert f"model '{tmp_path / 'nowhere'}' does not exist" in absent.err
