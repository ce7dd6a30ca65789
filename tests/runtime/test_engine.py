"""Opening the plan of a bundle: only on a library and device that it fits, and only the bytes of the manifest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_plans import close, plan_of

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.probe import Probe
from cushion_deploy.engines.tensorrt.compatibility import mismatches
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.errors import CheckFailed, MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import open_engine, read_engine
from cushion_deploy.store import publish, staging_area

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)


@pytest.fixture(scope="module")
def graph(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the tiny model's graph in float16, as engines take it."""
    loaded, folder = tiny.loaded, tmp_path_factory.mktemp("engine")
    form = GraphForm(dtype="float16", quantized=False, prefix=tiny.graph.contract.prefix_mode)
    return export_graph(loaded.spec, loaded.weights, Quantization(tiny.prefix, QuantScheme()), form, folder)


@pytest.fixture
def bundle(graph: ExportedGraph, hf_folder: Path, tiny: Any, tmp_path: Path) -> Path:
    """Return a bundle with a plan of the fake for sm86."""
    out, plan = tmp_path / "bundle", plan_of(graph)
    artifact = EngineArtifact(
        engine="tensorrt-rtx", targets=("sm80", "sm86"), key="k", files=("sm80+sm86.engine", "engine.json"),
        linears=0, int8_linears=0, fused_attention=0, ran=False, details={},
        lineage=replace(tiny.graph.lineage, graph=graph.digest), versions={"tensorrt-rtx": "1.7.1.116"},
    )  # fmt: skip
    with staging_area(out) as staged:
        for source in tiny.graph.files:
            (staged / source.name).write_bytes(source.read_bytes())
        for name in ("config.json", "tokenizer.json"):
            (staged / name).write_bytes((hf_folder / name).read_bytes())
        (staged / "export.json").write_text(json.dumps(tiny.graph.to_json()))
        folder = staged / "engines" / "tensorrt-rtx"
        folder.mkdir(parents=True)
        (folder / artifact.files[0]).write_bytes(plan)
        (folder / "engine.json").write_text(json.dumps(artifact.to_json()))
        publish(staged, out, {}, {})
    return out


def here(monkeypatch: pytest.MonkeyPatch, version: str, *gpus: str) -> None:
    monkeypatch.setattr("cushion_deploy.engines.tensorrt.engine.probe", lambda module: Probe(module, version, gpus))


def test_a_bundle_runs_on_its_plan(bundle: Path, device: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "1.7.1.116", "sm86 NVIDIA GeForce RTX 3090")
    opened = open_bundle(bundle)
    session: Any = open_engine(opened, "tensorrt-rtx")
    close(session.run(ids[:, :9]), open_engine(opened).run(ids[:, :9]))
    session.close()


def test_every_mismatch_is_named_with_its_fix(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    here(monkeypatch, "1.8.0", "sm89 NVIDIA GeForce RTX 4090")
    with pytest.raises(CheckFailed) as caught:
        open_engine(opened, "tensorrt-rtx")
    assert "compiled by tensorrt-rtx 1.7.1.116 and 1.8.0 is installed" in caught.value.message
    assert "for sm80, sm86 and this device is sm89 NVIDIA GeForce RTX 4090" in caught.value.message
    assert "cushion-deploy engine BUNDLE --engine tensorrt-rtx --targets sm89" in caught.value.hint
    other = replace(opened, graph=replace(opened.graph, lineage=replace(opened.graph.lineage, scales="0" * 64)))
    here(monkeypatch, "1.7.1.116", "sm86 x")
    with pytest.raises(CheckFailed, match=r"^the plan was compiled from other activation scales than this bundle's$"):
        open_engine(other, "tensorrt-rtx")
    kv = replace(opened, graph=replace(opened.graph, lineage=replace(opened.graph.lineage, kv_scales="0" * 64)))
    with pytest.raises(CheckFailed, match=r"^the plan was compiled from other cache scales than this bundle's$"):
        open_engine(kv, "tensorrt-rtx")
    cached = replace(read_engine(opened, "tensorrt-rtx"), details={"prefix_mode": "cache"})
    (mode,) = mismatches(cached, opened.graph, "1.7.1.116", ["sm86 x"])
    assert mode.problem == "the plan was compiled with export.prefix=cache, this bundle has baked"
    artifact = replace(read_engine(opened, "tensorrt-rtx"), details={"device": "sm86 NVIDIA A10"})
    (tuned,) = mismatches(artifact, opened.graph, "1.7.1.116", ["sm86 NVIDIA A40"])
    assert tuned.problem == "the plan is for sm86 NVIDIA A10 and this device is sm86 NVIDIA A40"
    assert mismatches(artifact, opened.graph, "1.7.1.116", ["sm86 NVIDIA A10"]) == []
    (hopper,) = mismatches(read_engine(opened, "tensorrt-rtx"), opened.graph, "1.7.1.116", ["sm90 NVIDIA H100"])
    assert "compile with --engine tensorrt, standard TensorRT" in hopper.fix
    assert "--targets sm90" not in hopper.fix
    here(monkeypatch, "1.7.1.116")
    with pytest.raises(MissingDependency, match="there is none here") as missing:
        open_engine(opened, "tensorrt-rtx")
    assert "--engine onnxruntime" in missing.value.hint
    here(monkeypatch, "")
    with pytest.raises(MissingDependency, match="cannot be used"):
        open_engine(opened, "tensorrt-rtx")
    with pytest.raises(UsageError, match="unknown engine"):
        open_engine(opened, "warp")


def test_a_plan_that_changed_after_verification_is_never_deserialized(
    bundle: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, "1.7.1.116", "sm86 x")
    opened = open_bundle(bundle)
    plan = bundle / "engines" / "tensorrt-rtx" / "sm80+sm86.engine"
    before = hashlib.sha256(plan.read_bytes()).hexdigest()
    plan.write_bytes(plan.read_bytes() + b" ")
    assert hashlib.sha256(plan.read_bytes()).hexdigest() != before
    monkeypatch.setattr(TensorRtSession, "__init__", lambda *_: pytest.fail("it was deserialized"))
    with pytest.raises(UntrustedArtifact, match="not the plan in the manifest"):
        open_engine(opened, "tensorrt-rtx")


def test_a_bundle_without_the_engine_says_so(tiny: Any, bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="was not built for engine 'tensorrt-rtx'"):
        open_engine(open_bundle(bundle_path), "tensorrt-rtx")
