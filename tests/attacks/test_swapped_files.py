"""Files of a bundle that another process writes after they were verified and before the engine has read them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import bundle_path, hf_folder, tiny, tokenizer

from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.parity.segments import edited_session
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.store import publish, staging_area
from cushion_deploy.verbs.parity import engines_to_run

__all__ = ["bundle_path", "hf_folder", "tiny", "tokenizer"]


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Path:
    """Return a copy to write in."""
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


def _overwrite(path: Path) -> None:
    """Flip one bit in place, and set the times back."""
    info, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with open(path, "r+b") as f:
        f.write(content)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _replace(path: Path) -> None:
    """Rename another file of the same size over it."""
    other = path.parent.parent / "other"
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def _add(path: Path) -> None:
    path.with_name("extra.json").write_text("{}")


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
@pytest.mark.parametrize("write", [_overwrite, _replace, _add, Path.unlink])
def test_a_file_written_before_the_engine_opens_is_found(
    tiny: Any, bundle: Path, name: str, write: Callable[[Path], None]
) -> None:
    opened = open_bundle(bundle)
    open_engine(opened, threads=1).close()
    write(bundle / name)
    # ONNX Runtime names a graph that is gone first.
    with pytest.raises((UntrustedArtifact, UsageError)) as e:
        open_engine(opened, threads=1)
    assert e.value.hint


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_a_file_swapped_for_the_time_of_the_load_only_is_found(
    tiny: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, data, kept = open_bundle(bundle), bundle / "model.onnx.data", bundle.parent / "kept"
    closed = []
    real = OnnxRuntime.open

    def attacked(self: OnnxRuntime, graph: Any, plan: bytes = b"", **options: Any) -> Any:
        content = bytes(data.stat().st_size)
        data.rename(kept)
        data.write_bytes(content)
        session = real(self, graph, plan, **options)
        kept.replace(data)
        monkeypatch.setattr(session, "close", lambda: closed.append(True), raising=True)
        return session

    monkeypatch.setattr(OnnxRuntime, "open", attacked)
    with pytest.raises(UntrustedArtifact, match=r"'model\.onnx\.data' .* was written or replaced while"):
        open_engine(opened, threads=1)
    assert closed


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Return a list of what is done after ONNX Runtime has opened a graph, one element for each time."""
    todo: list[Callable[[], None]] = []
    real = OnnxRuntime.open

    def watched(self: OnnxRuntime, *arguments: Any, **options: Any) -> Any:
        session = real(self, *arguments, **options)
        todo.pop(0)()
        return session

    monkeypatch.setattr(OnnxRuntime, "open", watched)
    return todo


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_a_file_that_another_build_links_meanwhile_is_verified_and_opened_again(
    tiny: Any, bundle: Path, opens: list[Callable[[], None]]
) -> None:
    opened, links = open_bundle(bundle), bundle.parent / "links"
    links.mkdir()
    opens += [lambda: os.link(bundle / "model.onnx.data", links / "0"), lambda: None]
    open_engine(opened, threads=1).close()
    assert not opens
    opens += [lambda i=i: os.link(bundle / "model.onnx", links / str(i)) for i in range(1, 4)]  # type: ignore[misc]
    with pytest.raises(UntrustedArtifact, match="was written or replaced while"):
        open_engine(opened, threads=1)
    assert not opens


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_a_file_written_in_place_for_the_time_of_the_load_is_not_what_runs(
    tiny: Any, bundle: Path, opens: list[Callable[[], None]]
) -> None:
    opened, data = open_bundle(bundle), bundle / "model.onnx.data"

    def restore() -> None:
        _overwrite(data)
        closed.append(opened)

    closed: list[Any] = []
    _overwrite(data)  # the first session reads other weights, and nothing but the change time tells later
    opens += [restore, lambda: closed.append(data)]
    open_engine(opened, threads=1).close()
    assert closed == [opened, data]


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_a_tokenizer_whose_change_time_is_another_is_not_used(tiny: Any, bundle: Path) -> None:
    opened = open_bundle(bundle)
    os.link(bundle / "tokenizer.json", bundle.parent / "link")
    with pytest.raises(UntrustedArtifact, match=r"'tokenizer\.json' .* was written or replaced while"):
        open_engine(opened, threads=1)


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_documents_may_be_edited_at_any_time(tiny: Any, bundle: Path) -> None:
    opened = open_bundle(bundle)
    (bundle / "README.md").write_text("edited")
    open_engine(opened, threads=1).close()


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_the_parity_ladder_leaves_the_files_as_they_are_and_refuses_others(tiny: Any, bundle: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    opened = open_bundle(bundle)
    (engine,) = engines_to_run(opened, ["openvino"])
    session = edited_session(opened.graph, lambda _: None, "fused")
    opened.require_unchanged()  # a link to the weights would change their state, for every process that reads them
    del session
    engine.open().close()
    with staging_area(bundle) as staged:
        for file in opened.manifest.files:
            shutil.copyfile(bundle / file, staged / file)
        publish(staged, bundle, {"another": "build"}, {})
    with pytest.raises(UntrustedArtifact, match="was written or replaced while"):
        engine.open()
