"""Bundles as the hub leaves them: links into `blobs/`, and documents that people and git add."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store import changed_documents, require_publishable, verify_bundle


@pytest.fixture
def snapshot(bundle: Path, tmp_path: Path) -> Path:
    """Return the bundle as ``huggingface_hub`` stores it: each file a relative link to a blob."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    folder = repository / "snapshots" / ("ab" * 20)
    for number, file in enumerate(sorted(p for p in bundle.rglob("*") if p.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", folder / file.relative_to(bundle)
        file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def relink(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_links_into_the_blobs_of_a_snapshot_are_files(snapshot: Path, tmp_path: Path) -> None:
    manifest = verify_bundle(snapshot)
    assert "engines/cpu/engine.json" in manifest.files
    assert changed_documents(snapshot, manifest) == {}
    (tmp_path / "latest").symlink_to(snapshot)
    assert verify_bundle(tmp_path / "latest") == manifest


@pytest.mark.parametrize("name", ["model.onnx", "engines/cpu/engine.json", "cushion.json"])
def test_a_damaged_blob_is_found(snapshot: Path, name: str) -> None:
    blob = (snapshot / name).resolve()
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UntrustedArtifact):
        verify_bundle(snapshot)


@pytest.mark.parametrize("where", ["outside", "other repository", "below blobs", "through blobs", "folder", "nowhere"])
@pytest.mark.parametrize("name", ["model.onnx", "cushion.json"])
def test_links_to_anywhere_else_are_refused(snapshot: Path, tmp_path: Path, where: str, name: str) -> None:
    link, blobs = snapshot / name, snapshot.parents[1] / "blobs"
    content = link.read_bytes()
    target = {
        "outside": tmp_path / "file",
        "other repository": tmp_path / "hub" / "models--org--other" / "blobs" / "a",
        "below blobs": blobs / "deep" / "a",
        "through blobs": tmp_path / "file",
        "folder": blobs / "folder",
        "nowhere": blobs / "gone",
    }[where]
    if where == "folder":
        target.mkdir()
    elif where != "nowhere":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    if where == "through blobs":
        (blobs / "b").symlink_to(target)
        target = blobs / "b"
    relink(link, target)
    with pytest.raises(UntrustedArtifact, match=r"is a link or a special|is a symbolic link"):
        verify_bundle(snapshot)


def test_a_link_to_a_folder_of_files_is_refused(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    file = snapshot / "engines" / "cpu" / "engine.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    (snapshot / "engines" / "cpu").rename(blobs / "cpu")
    (snapshot / "engines" / "cpu").symlink_to(blobs / "cpu")
    with pytest.raises(UntrustedArtifact, match="is a symbolic link"):
        verify_bundle(snapshot)


@pytest.mark.parametrize("layout", ["datasets--org--name/snapshots", "models--org--name/revisions", "name/snapshots"])
def test_links_in_another_layout_are_refused(snapshot: Path, tmp_path: Path, layout: str) -> None:
    there = tmp_path / "elsewhere" / layout
    there.parent.mkdir(parents=True)
    snapshot.parents[1].joinpath("blobs").rename(there.parent / "blobs")
    snapshot.parent.rename(there)
    with pytest.raises(UntrustedArtifact, match="is a link or a special"):
        verify_bundle(there / snapshot.name)


def test_blobs_that_are_a_link_themselves_are_not_followed(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(UntrustedArtifact, match="is a link or a special"):
        verify_bundle(snapshot)


ADDED = ["README.md", ".gitattributes", "LICENSE", ".git/config", ".git/hooks/post-checkout", ".cache/huggingface/x"]


@pytest.mark.parametrize("name", ADDED)
def test_documents_are_named_and_not_fatal(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("from the hub")
    assert changed_documents(bundle, verify_bundle(bundle)) == {name: "added"}
    with pytest.raises(UsageError, match="do not belong"):
        require_publishable(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "chat_template.jinja",
        "generation_config.json",
        "deep/README.md",
        "readme.md.onnx",
        ".cache/x",
        "git",
    ],
)
def test_everything_else_that_is_added_is_fatal(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("from the hub")
    with pytest.raises(UntrustedArtifact, match="not listed"):
        verify_bundle(bundle)


def test_a_document_that_leads_elsewhere_is_fatal(bundle: Path, tmp_path: Path) -> None:
    (bundle / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UntrustedArtifact, match="symbolic link"):
        verify_bundle(bundle)


def test_a_document_of_the_bundle_may_be_edited_or_removed(tmp_path: Path) -> None:
    from cushion_deploy.store import publish, staging_area

    with staging_area(tmp_path / "out") as staged:
        (staged / "README.md").write_text("a card")
        (staged / "model.onnx").write_text("a graph")
        publish(staged, tmp_path / "out", {}, {})
    manifest = verify_bundle(tmp_path / "out")
    assert "README.md" in manifest.files
    assert changed_documents(tmp_path / "out", manifest) == {}
    (tmp_path / "out" / "README.md").write_text("a better card")
    assert changed_documents(tmp_path / "out", verify_bundle(tmp_path / "out")) == {"README.md": "edited"}
    require_publishable(tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    assert changed_documents(tmp_path / "out", verify_bundle(tmp_path / "out")) == {"README.md": "removed"}
