"""Single bits flipped in a finished bundle and in a work folder: each is found before an engine reads a byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from small_build import SmallBuild
from stopped_builds import Trial

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.runtime.text import load
from cushion_deploy.store import StageStore


def flipped(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Flip ``count`` bits one after the other, spread evenly over all files, large and small."""
    del root
    chance = random.Random(seed)
    files = [path for top in (build.bundle, build.work / "stages") for path in sorted(top.rglob("*")) if path.is_file()]
    files = [path for path in files if path.stat().st_size and path.name != "README.md"]
    for number in range(count):
        path = files[number % len(files)]
        with _flipped(path, chance.randrange(8 * path.stat().st_size)):
            wrong = _in_bundle(build) if path.is_relative_to(build.bundle) else _in_work(build, path)
        yield Trial(f"bit of {path.suffix[1:] or path.name}", True, f"{path.name}: {wrong}" if wrong else "")


@contextmanager
def _flipped(path: Path, bit: int) -> Iterator[None]:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _in_bundle(build: SmallBuild) -> str:
    with mock.patch("onnxruntime.InferenceSession", side_effect=AssertionError("an engine was opened")):
        try:
            load(build.bundle)
        except UntrustedArtifact:
            return ""
        except Exception as e:
            return f"{type(e).__name__}: {e}"
    return "accepted"


def _in_work(build: SmallBuild, path: Path) -> str:
    """Return what is wrong if the stage with the damaged file is reused; the store removes a damaged stage."""
    stage, key = path.relative_to(build.work / "stages").parts[:2]
    folder = build.work / "stages" / stage / key
    kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    try:
        return "" if StageStore(build.work).find(stage, key) is None else "the damaged stage is reused"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        for file, content in kept.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
