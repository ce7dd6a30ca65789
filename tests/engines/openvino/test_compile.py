"""OpenVINO compiles once: its blob is counted, digest-checked and used where it fits, and model.onnx elsewhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from broken_graphs import VICTIM, float_linear, float_weight

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.session import open_session as open_onnxruntime
from cushion_deploy.engines.openvino import model as model_file
from cushion_deploy.engines.openvino.engine import OpenVino
from cushion_deploy.errors import CheckFailed, ExitCode, UntrustedArtifact, UsageError
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.store import publish, staging_area

pytestmark = pytest.mark.usefixtures("exact")
STRICT = CompileOptions()
LAYERS = 3
LINEARS = 7 * LAYERS + 1


@pytest.mark.parametrize(("name", "linears"), [("int8", LINEARS), ("float head", LINEARS - 1)])
def test_every_linear_of_the_graph_runs_in_int8(
    name: str, linears: int, tiny_graphs: dict[str, ExportedGraph], tmp_path: Path
) -> None:
    artifact = OpenVino().compile(tiny_graphs[name], tmp_path, STRICT)
    assert (artifact.linears, artifact.int8_linears) == (linears, linears)
    assert artifact.details["left_in_float"] == []
    assert artifact.details["layers"]["FullyConnected i8"] == len(tiny_graphs[name].sites)


def test_a_float_graph_has_nothing_to_prove(tiny_graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    artifact = OpenVino().compile(tiny_graphs["float"], tmp_path, STRICT)
    assert (artifact.linears, artifact.int8_linears) == (LINEARS, 0)
    assert artifact.details["left_in_float"] == []


@pytest.mark.parametrize("sabotage", [float_linear, float_weight])
def test_a_linear_that_left_int8_is_found_and_fails_unless_allowed(
    sabotage: Callable[[onnx.ModelProto], None], tiny_graphs: Any, edited: Any, tmp_path: Path
) -> None:
    graph, out = edited(tiny_graphs["int8"], sabotage), tmp_path / "engine"
    out.mkdir()
    for allowed in (0, 1):
        with pytest.raises(CheckFailed, match=f"runs {LINEARS - 2} of {LINEARS} linears in INT8") as caught:
            OpenVino().compile(graph, out, CompileOptions(allow_float_linears=allowed))
        assert caught.value.exit_code == ExitCode.CHECK_FAILED
        assert "--allow-float-linears" in caught.value.hint
        assert VICTIM in caught.value.message
        assert not list(out.iterdir())
    artifact = OpenVino().compile(graph, out, CompileOptions(allow_float_linears=2))
    assert (artifact.linears, artifact.int8_linears) == (LINEARS, LINEARS - 2)


def test_int8_weights_alone_do_not_count(tiny_graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenVINO's own switch: without its low-precision passes it multiplies float32 activations, and yet its runtime
    # model calls the layer i8, after its weights.
    real = model_file.settings
    monkeypatch.setattr(model_file, "settings", lambda threads: {**real(threads), "LP_TRANSFORMS_MODE": "NO"})
    with pytest.raises(
        CheckFailed, match=f"runs 0 of {LINEARS} linears in INT8; left: head: FullyConnected in i8 on f32 "
    ):
        OpenVino().compile(tiny_graphs["int8"], tmp_path, STRICT)


def test_engine_json_is_the_artifact(tiny_graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    from importlib import metadata

    graph = tiny_graphs["int8"]
    before = {p: p.read_bytes() for p in graph.path.parent.iterdir()}
    artifact = OpenVino().compile(graph, tmp_path, STRICT)
    again = EngineArtifact.from_json(json.loads((tmp_path / "engine.json").read_text()))
    assert again == artifact
    assert sorted(again.files) == sorted(p.name for p in tmp_path.iterdir()) == ["cpu.blob", "engine.json"]
    assert again.details["blob_bytes"] == (tmp_path / "cpu.blob").stat().st_size
    assert (again.lineage, again.versions) == (Lineage(graph=graph.digest), {"openvino": metadata.version("openvino")})
    assert not again.ran
    assert {p: p.read_bytes() for p in graph.path.parent.iterdir()} == before


@pytest.fixture
def bundle(tiny_graphs: dict[str, ExportedGraph], hf_folder: Path, tmp_path: Path) -> Path:
    """Return a bundle of the quantized graph with a blob."""
    out, graph = tmp_path / "bundle", tiny_graphs["int8"]
    with staging_area(out) as staged:
        (staged / "model.onnx").write_bytes(graph.path.read_bytes())
        (staged / graph.files[1].name).write_bytes(graph.files[1].read_bytes())
        for name in ("config.json", "tokenizer.json"):
            (staged / name).write_bytes((hf_folder / name).read_bytes())
        (staged / "export.json").write_text(json.dumps({**graph.to_json(), "path": "model.onnx"}))
        folder = staged / "engines" / "openvino"
        folder.mkdir(parents=True)
        OpenVino().compile(graph, folder, STRICT)
        publish(staged, out, {}, {})
    return out


@pytest.fixture
def prompt(tiny_graphs: dict[str, ExportedGraph]) -> Any:
    """Return token ids, int64 ``[1, 24]``."""
    return np.random.default_rng(3).integers(3, tiny_graphs["int8"].contract.vocab_size, (1, 24))


def same(found: Any, graph: ExportedGraph, prompt: Any) -> bool:
    """Return whether logits are those of ONNX Runtime, up to codes on the other side of a tie."""
    expected = open_onnxruntime(graph, threads=1).run(prompt, need_logits="all")
    return bool(np.abs(found - expected).max() <= 0.05 * np.abs(expected).max())


def test_a_bundle_opens_from_its_blob_without_the_graph(
    bundle: Path, prompt: Any, tiny_graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(bundle)

    def unused(*_: Any) -> Any:
        raise AssertionError("model.onnx was compiled")

    monkeypatch.setattr("cushion_deploy.engines.openvino.session.compile_graph", unused)
    session: Any = open_engine(opened, "openvino", threads=1)
    assert same(session.run(prompt, need_logits="all"), tiny_graphs["int8"], prompt)


RUN = """
import sys
import numpy as np
from cushion_deploy.engines.openvino import session as file
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import open_engine
used = []
for name in ("import_blob", "compile_graph"):
    real = getattr(file, name)
    setattr(file, name, lambda *a, real=real, name=name: used.append(name) or real(*a))
session = open_engine(open_bundle(sys.argv[1]), "openvino", 1)
logits = session.run(np.array([[int(x) for x in sys.argv[2].split(",")]]), need_logits="all")
np.save(sys.argv[3], logits)
print(used)
"""


@pytest.mark.skipif(
    " avx_vnni " not in Path("/proc/cpuinfo").read_text() or "avx512" not in Path("/proc/cpuinfo").read_text(),
    reason="needs a processor with AVX-VNNI and more",
)
def test_on_another_processor_the_graph_is_compiled_again(
    bundle: Path, prompt: Any, tiny_graphs: Any, tmp_path: Path, python: Callable[..., str]
) -> None:
    arguments = str(bundle), ",".join(map(str, prompt[0])), str(tmp_path / "logits.npy")
    assert python(RUN, *arguments) == "['import_blob']"
    assert same(np.load(tmp_path / "logits.npy"), tiny_graphs["int8"], prompt)
    assert python(RUN, *arguments, isa="AVX2_VNNI") == "['compile_graph']"
    assert same(np.load(tmp_path / "logits.npy"), tiny_graphs["int8"], prompt)


def test_a_blob_that_changed_is_never_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    blob = bundle / "engines" / "openvino" / "cpu.blob"
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    monkeypatch.setattr("cushion_deploy.engines.openvino.session.import_blob", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UntrustedArtifact, match=r"cpu\.blob is not the plan in the manifest"):
        open_engine(opened, "openvino")
    with pytest.raises(UntrustedArtifact, match=r"cpu\.blob"):
        open_bundle(bundle)


def test_a_blob_of_another_graph_is_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    other = dataclasses.replace(opened, graph=dataclasses.replace(opened.graph, digest="0" * 64))
    with pytest.raises(CheckFailed, match="compiled from another graph") as caught:
        open_engine(other, "openvino")
    assert "cushion-deploy engine" in caught.value.hint


def test_bytes_that_are_no_blob_are_an_error_with_advice(tiny_graphs: dict[str, ExportedGraph]) -> None:
    with pytest.raises(UntrustedArtifact, match="OpenVINO cannot read the blob") as caught:
        OpenVino().open(tiny_graphs["int8"], b"no blob" * 100)
    assert "cushion-deploy engine" in caught.value.hint


def test_a_bundle_that_was_not_built_for_it_is_compiled_when_opened(
    bundle: Path, tiny_graphs: Any, prompt: Any
) -> None:
    opened = open_bundle(bundle)
    files = {name: entry for name, entry in opened.manifest.files.items() if not name.startswith("engines/")}
    bare = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, files=files))
    session: Any = open_engine(bare, "openvino", threads=1)
    assert same(session.run(prompt, need_logits="all"), tiny_graphs["int8"], prompt)


def test_space_is_asked_for_first(tiny_graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, needed: int) -> None:
        assert needed == 2 * tiny_graphs["int8"].size
        raise UsageError("too little space", hint="free some")

    monkeypatch.setattr("cushion_deploy.engines.openvino.compile.require_space", full)
    with pytest.raises(UsageError, match="too little space"):
        OpenVino().compile(tiny_graphs["int8"], tmp_path, STRICT)
    assert not list(tmp_path.iterdir())
