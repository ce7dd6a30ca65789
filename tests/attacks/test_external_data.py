"""Graphs whose tensors point outside their bundle: ONNX Runtime must refuse them or read only what the bundle holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tiny_llama import bundle_path, hf_folder, tiny, tokenizer

from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.external_data import read_graph
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import MissingDependency, UntrustedArtifact
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.store import publish, staging_area

__all__ = ["bundle_path", "hf_folder", "tiny", "tokenizer"]

SECRET = np.arange(100, 116, dtype=np.float32)
"""Content of a file outside of the bundle that no session may return."""
OWN = np.arange(16, dtype=np.float32)


def _graph(folder: Path, location: str, offset: int = 0, length: int = 64) -> Path:
    """Write a graph that returns one float32 tensor ``[16]`` of external data."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    node = helper.make_node("Identity", ["w"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [16])
    model = helper.make_model(
        helper.make_graph([node], "g", [], [out], [tensor]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the data of a graph, beside a file that is none of its business."""
    (tmp_path / "secret").write_bytes(SECRET.tobytes())
    found = tmp_path / "bundle"
    found.mkdir()
    (found / "model.onnx.data").write_bytes(OWN.tobytes())
    return found


def test_the_harmless_form_is_read(folder: Path) -> None:
    session = ort.InferenceSession(_graph(folder, "model.onnx.data"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], OWN)


def _link(folder: Path, target: Path) -> str:
    (folder / "link").symlink_to(target)
    return "link"


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "absolute": lambda f: _graph(f, str(f.parent / "secret")),
    "parent": lambda f: _graph(f, "../secret"),
    "parent inside": lambda f: _graph(f, "nowhere/../../secret"),
    "link": lambda f: _graph(f, _link(f, f.parent / "secret")),
    "device": lambda f: _graph(f, "/dev/zero"),
    "link to a device": lambda f: _graph(f, _link(f, Path("/dev/zero"))),
    "process memory": lambda f: _graph(f, "/proc/self/mem"),
    "beyond the end": lambda f: _graph(f, "model.onnx.data", offset=4096),
    "longer than the file": lambda f: _graph(f, "model.onnx.data", offset=32),
    "negative offset": lambda f: _graph(f, "model.onnx.data", offset=-64),
    "huge offset": lambda f: _graph(f, "model.onnx.data", offset=2**63 - 1),
    "another length": lambda f: _graph(f, "model.onnx.data", length=4),
    "missing": lambda f: _graph(f, "nowhere"),
    "folder": lambda f: _graph(f, "."),
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
def test_onnx_runtime_refuses_it(folder: Path, write: Callable[[Path], Path]) -> None:
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        ort.InferenceSession(write(folder), providers=["CPUExecutionProvider"])


HARMLESS_IN_IR = {"another length"}
"""onnx_ir derives the length from the shape and reads the bytes of the bundle's own file."""


@pytest.mark.parametrize("name", HOSTILE)
def test_onnx_ir_refuses_it(folder: Path, name: str) -> None:
    # Graphs of the work folder are read with it, for parity by segments.
    def read() -> object:
        tensor = ir.load(HOSTILE[name](folder)).graph.initializers["w"].const_value
        assert tensor is not None
        return tensor.numpy()

    if name in HARMLESS_IN_IR:
        np.testing.assert_array_equal(read(), OWN)
        return
    with pytest.raises((ValueError, OSError, ir.serde.SerdeError)):
        read()


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard link", "symbolic link"])
def test_values_are_read_through_links(folder: Path, link: Callable[[Path, Path], None]) -> None:
    # Copies by `cp -l` and snapshots of the hub; their digests were verified.
    (folder / "model.onnx.data").rename(folder.parent / "blob")
    link(folder.parent / "blob", folder / "model.onnx.data")
    graph = _graph(folder, "model.onnx.data")
    np.testing.assert_array_equal(read_graph(graph).graph.initializers["w"].const_value.numpy(), OWN)
    with pytest.raises(ValueError, match=r"link attack|symbolic link"):  # what makes a function of our own necessary
        ir.load(graph).graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in HARMLESS_IN_IR and "link" not in name])
def test_no_value_is_read_from_elsewhere(folder: Path, name: str) -> None:
    with pytest.raises((UntrustedArtifact, ValueError, OSError, ir.serde.SerdeError)):
        read_graph(HOSTILE[name](folder)).graph.initializers["w"].const_value.numpy()


def _point_outside(path: Path) -> None:
    """Let all external tensors of a graph be read from a file beside its folder."""
    model = onnx.load(path, load_external_data=False)
    moved = [t for t in model.graph.initializer if t.external_data]
    assert moved
    for tensor in moved:
        next(e for e in tensor.external_data if e.key == "location").value = "../secret"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx"])
@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_nothing_is_compiled_from_it(tiny: Any, tmp_path: Path, engine: str) -> None:
    try:
        ENGINES[engine].require()
    except MissingDependency as e:
        pytest.skip(e.message)
    (tmp_path / "secret").write_bytes(bytes(1 << 22))
    for folder in ("graph", "compiled"):
        (tmp_path / folder).mkdir()
    forged = tmp_path / "graph" / "model.onnx"
    forged.write_bytes(tiny.plain.path.read_bytes())
    _point_outside(forged)
    with pytest.raises(UntrustedArtifact, match="not a file beside it"):
        ENGINES[engine].compile(replace(tiny.plain, path=forged), tmp_path / "compiled", CompileOptions())
    assert not list((tmp_path / "compiled").iterdir())


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_the_engine_says_which_graph_cannot_be_loaded(tiny: Any, tmp_path: Path, bundle_path: Path) -> None:
    """A forged bundle: every digest is right, and the graph reads a file beside the bundle."""
    (tmp_path / "secret").write_bytes(bytes(1 << 22))
    forged = tmp_path / "bundle"
    with staging_area(forged) as staged:
        for source in bundle_path.iterdir():
            (staged / source.name).write_bytes(source.read_bytes())
        _point_outside(staged / "model.onnx")
        (staged / "cushion.json").unlink()
        publish(staged, forged, {}, {})
    bundle = open_bundle(forged)
    with pytest.raises(UntrustedArtifact, match="not a file beside it") as e:
        open_engine(bundle, threads=1)
    assert "secret" in e.value.message
