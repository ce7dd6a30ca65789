"""Mutate a bundle in any one place, and it is refused: every byte, every name, every file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.errors import ExitCode, UntrustedArtifact
from cushion_deploy.store import verify_bundle


@contextmanager
def _copy(bundle: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(bundle, Path(folder, "bundle")))


def _refused(bundle: Path) -> str:
    with pytest.raises(UntrustedArtifact) as e:
        verify_bundle(bundle)
    assert e.value.exit_code == ExitCode.UNTRUSTED
    assert e.value.hint
    return e.value.message


def _files(bundle: Path) -> list[Path]:
    return sorted(p for p in bundle.rglob("*") if p.is_file())


def test_an_exact_copy_is_accepted(pristine: Path) -> None:
    with _copy(pristine) as bundle:
        assert verify_bundle(bundle) == verify_bundle(pristine)


def test_every_byte_of_the_manifest_counts(pristine: Path) -> None:
    data = (pristine / "cushion.json").read_bytes()
    with _copy(pristine) as bundle:
        for position in range(len(data)):
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            (bundle / "cushion.json").write_bytes(flipped)
            _refused(bundle)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused(pristine: Path, data: st.DataObject) -> None:
    with _copy(pristine) as bundle:
        victim = data.draw(st.sampled_from([p for p in _files(bundle) if p.stat().st_size]))
        content = bytearray(victim.read_bytes())
        bit = data.draw(st.integers(0, len(content) * 8 - 1))
        content[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(content)
        assert victim.name in _refused(bundle)


def _truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[: -1 - count])


def _append(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes() + b" " * (count + 1))


def _rename(path: Path, count: int) -> None:
    path.rename(path.with_name(path.name + "x" * (count + 1)))


def _delete(path: Path, _: int) -> None:
    path.unlink()


def _duplicate(path: Path, count: int) -> None:
    shutil.copy(path, path.with_name(f"copy{count}-{path.name}"))


def _become_folder(path: Path, _: int) -> None:
    path.unlink()
    path.mkdir()


def _swap_for_link(path: Path, _: int) -> None:
    path.rename(path.parents[1] / "moved")
    path.symlink_to(path.parents[1] / "moved")


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    data=st.data(),
    mutate=st.sampled_from([_truncate, _append, _rename, _delete, _duplicate, _become_folder, _swap_for_link]),
    count=st.integers(0, 40),
)
def test_any_other_change_of_any_file_is_refused(
    pristine: Path, data: st.DataObject, mutate: Callable[[Path, int], None], count: int
) -> None:
    with _copy(pristine) as bundle:
        files = [p for p in _files(bundle) if p.stat().st_size or mutate is not _truncate]
        mutate(data.draw(st.sampled_from(files)), count)
        _refused(bundle)
