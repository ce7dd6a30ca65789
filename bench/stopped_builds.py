"""Builds that are killed, interrupted, raced or run out of disk: what is left is whole, and the next run goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from small_build import SmallBuild, scratch

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
BUSY = "another command is using the work folder"


@dataclass(frozen=True)
class Trial:
    """One fault and what followed.

    Attributes:
        kind: the fault, and where.
        hit: whether it struck; a build can end before its signal.
        wrong: what is not as it should be; empty for nothing.
    """

    kind: str
    hit: bool
    wrong: str = ""


def killed(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Kill builds with SIGKILL at random instants: ``count`` times while each stage, or what follows the last, runs.

    The next run finds the stages behind the one that was killed, which saves most of its time. It reuses them only if
    what that stage wrote has the same digest as in the undisturbed build.
    """
    chance = random.Random(seed)
    until = {stage: _seconds(build, root, stage) for stage in (*build.stages, None)}
    for _ in range(count):  # a run that is stopped has killed every stage about as often
        for stage, seconds in until.items():
            yield _killed_in(build, root, stage, chance.uniform(0, seconds))


def _killed_in(build: SmallBuild, root: Path, stage: str | None, seconds: float) -> Trial:
    """Kill a build ``seconds`` after its start; it goes on with ``stage``, or with the publication for None."""
    with scratch(root, "trial") as folder:
        work, bundle, log = folder / "work", folder / "bundle", folder / "log"
        build.copy_work(work, stage)
        child = build.start(work, bundle, log)
        early = child.wait(seconds)
        child.send(signal.SIGKILL)
        code = early if early is not None else child.finish()
        wrong = "" if code in (0, -signal.SIGKILL) else f"exit code {code}: {child.output[-300:]}"
        wrong = wrong or build.half(work, bundle)
        if stage:
            build.copy_later(work, stage)
        wrong = wrong or build.goes_on(work, bundle, log)
        kind = f"kill during {stage.split('/')[0] if stage else 'publication'}"
        return Trial(kind, code == -signal.SIGKILL, wrong)


def _seconds(build: SmallBuild, root: Path, stage: str | None) -> float:
    """Return how long a build takes until ``stage``, its next one, is finished; until its end for None."""
    with scratch(root, "timed") as folder:
        work, bundle = folder / "work", folder / "bundle"
        build.copy_work(work, stage)
        began = time.monotonic()
        child = build.start(work, bundle, folder / "log")
        while child.wait(0.01) is None:
            if stage and (work / "stages" / stage).exists():
                child.send(signal.SIGKILL)
                child.finish()
                break
        return time.monotonic() - began


def interrupted(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Send SIGINT and SIGTERM, ``count`` times each, at random instants of whole builds."""
    chance = random.Random(seed)
    for number, expected in EXIT_CODES.items():
        for _ in range(count):
            with scratch(root, "trial") as folder:
                work, bundle, log = folder / "work", folder / "bundle", folder / "log"
                child = build.start(work, bundle, log)
                code = child.wait(chance.uniform(0.2, build.seconds))
                hit = code is None
                if hit:
                    child.send(number)
                    code = child.finish()
                wrong = "" if code in (expected, 0) else f"exit code {code}: {child.output[-300:]}"
                if not wrong and code and list((work / "tmp").glob("*")):
                    wrong = "a temporary folder is left"
                wrong = wrong or build.half(work, bundle) or build.goes_on(work, bundle, log)
                yield Trial(number.name, hit and code == expected, wrong)


def raced(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Start two or three builds into one work folder and output at nearly the same time."""
    chance = random.Random(seed)
    for _ in range(count):
        runners = chance.choice((2, 3))
        with scratch(root, "trial") as folder:
            work, bundle = folder / "work", folder / "bundle"
            logs = [folder / f"log{i}" for i in range(runners)]
            children = []
            for log in logs:
                children.append(build.start(work, bundle, log))
                children[-1].wait(chance.uniform(0, 0.3))
            codes = [child.finish() for child in children]
            wrong = "" if 0 in codes else f"no build won: {codes}"
            for code, child in zip(codes, children, strict=True):
                if code and not wrong and (code != 2 or BUSY not in child.output):
                    wrong = f"exit code {code}: {child.output[-300:]}"
            for log in logs:
                log.unlink()
            wrong = wrong or build.goes_on(work, bundle, folder / "log")
            yield Trial(f"race of {runners}", True, wrong)


def disk_full(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Run builds on a file system that is too small by a random amount, then enlarge it; needs root, on Linux.

    Raises:
        PermissionError: a file system cannot be mounted.
    """
    chance = random.Random(seed)
    files = [path for top in (build.work, build.bundle) for path in top.rglob("*") if path.is_file()]
    needed = sum(path.stat().st_size for path in files)
    for _ in range(count):
        size = chance.randrange(16, needed // 1024)
        with scratch(root, "trial") as folder:
            disk = folder / "disk"
            disk.mkdir()
            _mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk)
            try:
                work, bundle = disk / "work", disk / "bundle"
                child = build.start(work, bundle, folder / "log")
                code = child.finish()
                wrong = ""
                if code and (code != 2 or str(disk) not in child.output.replace("\n", "")):
                    wrong = f"exit code {code}: {child.output[-300:]}"
                wrong = wrong or build.half(work, bundle)
                _mount("-o", f"remount,size={16 * needed}", disk)
                yield Trial("disk full", code == 2, wrong or build.goes_on(work, bundle, disk / "log"))
            finally:
                subprocess.run(["umount", str(disk)], check=False)


def _mount(*arguments: str | Path) -> None:
    found = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if found.returncode:
        raise PermissionError(f"mount: {found.stderr.strip()}")
