"""A build of a small planted model that takes seconds: its inputs, its result, and what must hold after a fault."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from forked import Child, start
from planted_model import SHAPES, write_model, write_text

from cushion_deploy.errors import CushionError
from cushion_deploy.store import StageStore, verify_bundle

RECIPE = """\
search: {ship: always, text_tokens: 64, random_candidates: 8, screen_candidates: 8, audit_tokens: 4, average_tokens: 16}
calibration: {windows: 4, window: 64}
evaluation: {window: 64, max_tokens: 128}
parity: {tokens: 64, decode_tokens: 4}
"""
DATED = ("cushion.json", "README.md", "report/")
"""Files of a bundle that state when it was built and how long that took."""


@dataclass(frozen=True)
class SmallBuild:
    """One build that can be run in any folder.

    Attributes:
        inputs: folder of the model, the texts and the recipe.
        bundle: the bundle of an undisturbed run.
        work: its work folder.
        seconds: how long it took.
        stages: its stages as ``name/key``, in the order in which they were finished.
    """

    inputs: Path
    bundle: Path
    work: Path
    seconds: float = 0.0
    stages: tuple[str, ...] = ()

    @classmethod
    def undisturbed(cls, folder: Path) -> SmallBuild:
        """Write the inputs below ``folder``, run the build, and return it.

        Raises:
            RuntimeError: the build failed.
        """
        inputs = folder / "inputs"
        inputs.mkdir(parents=True)
        pid = os.fork()  # torch starts its threads in the child: forks of the parent must not have lost any
        if pid == 0:
            _write_inputs(inputs)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError("the inputs of the build could not be written")
        (inputs / "recipe.yaml").write_text(RECIPE)
        planned = cls(inputs, folder / "bundle", folder / "work")
        began = time.monotonic()
        child = planned.start(planned.work, planned.bundle, folder / "log")
        if child.finish() != 0:
            raise RuntimeError(f"the undisturbed build failed:\n{child.output}")
        seconds = time.monotonic() - began
        found = sorted((planned.work / "stages").glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
        stages = tuple(path.relative_to(planned.work / "stages").as_posix() for path in found)
        return cls(inputs, planned.bundle, planned.work, seconds, stages)

    def start(self, work: Path, bundle: Path, log: Path) -> Child:
        """Start the build with another work folder and output."""
        inputs = self.inputs
        return start(
            [
                *("build", "--model", inputs / "model", "--recipe", inputs / "recipe.yaml"),
                *("--calib-data", inputs / "calib.txt", "--eval-data", inputs / "eval.txt"),
                *("--engine", "onnxruntime", "--work-dir", work, "--output", bundle),
            ],
            log,
        )

    def copy_work(self, target: Path, before: str | None = None) -> None:
        """Copy the finished stages to another work folder; only those that were finished before ``before``."""
        for stage in self.stages:
            if stage == before:
                break
            shutil.copytree(self.work / "stages" / stage, target / "stages" / stage)

    def copy_later(self, target: Path, after: str) -> None:
        """Copy the stages that were finished after ``after``; a run reuses them if all before have the same bytes."""
        for stage in self.stages[self.stages.index(after) + 1 :]:
            shutil.copytree(self.work / "stages" / stage, target / "stages" / stage, dirs_exist_ok=True)

    def half(self, work: Path, bundle: Path) -> str:
        """Return what is corrupt after a stopped build: empty for nothing."""
        if bundle.exists():
            try:
                verify_bundle(bundle)
            except CushionError as e:
                return f"corrupt bundle: {e.message}"
            if difference := self.differs(bundle):
                return difference
        return self.damaged_stage(work)

    def damaged_stage(self, work: Path) -> str:
        """Return the name of a stage that is in a work folder and not whole; empty for none."""
        store = StageStore(work)
        for path in (work / "stages").glob("*/*"):
            if store.find(*path.parts[-2:]) is None:
                return f"damaged stage: {path.parts[-2]}"
        return ""

    def differs(self, bundle: Path) -> str:
        """Return a file in which a bundle differs from the undisturbed one, dates aside; empty for none."""
        names = {path: path.relative_to(root).as_posix() for root in (bundle, self.bundle) for path in _files(root)}
        for name in sorted(set(names.values())):
            if name.startswith(DATED):
                continue
            ours, theirs = bundle / name, self.bundle / name
            if not ours.is_file() or not theirs.is_file() or ours.read_bytes() != theirs.read_bytes():
                return f"other bytes: {name}"
        return ""

    def goes_on(self, work: Path, bundle: Path, log: Path) -> str:
        """Run the build to its end in the folders of a stopped one; return what is wrong with it, empty for nothing."""
        child = self.start(work, bundle, log)
        code = child.finish()
        if code != 0:
            return f"the next run exits with {code}: {child.output[-300:]}"
        left = [path.name for path in bundle.parent.iterdir() if path.name not in (bundle.name, work.name, log.name)]
        kept = [path.name for path in (work / "tmp").glob("*")] + [path.name for path in (work / "scratch").glob("*/*")]
        if left or kept:
            return f"left behind: {(left + kept)[0]}"
        return self.half(work, bundle)


def _write_inputs(folder: Path) -> NoReturn:
    """Write model and texts in a fork, and end it in any case: it must not clean up what its parent has open."""
    code = 1
    try:
        write_model(folder / "model", SHAPES["small"], "cpu", 0)
        for seed, (name, tokens) in enumerate((("calib.txt", 4000), ("eval.txt", 2000))):
            write_text(folder / name, SHAPES["small"], tokens, seed)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@contextmanager
def scratch(root: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder that is removed afterwards."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
