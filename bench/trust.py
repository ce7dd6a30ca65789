"""Count faults of every kind against the product: ``python bench/trust.py [KIND ...] [--share 0.1]``.

stderr shows one line a kind, stdout is one JSON object. Exit code 1 if anything was not as it should be. A run that
gets SIGINT or SIGTERM ends after the trial that is running, prints what it has counted, and exits with 130 or 143.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from flipped_bits import flipped
from forked import import_libraries
from mutated_inputs import mutated
from small_build import SmallBuild
from stopped_builds import Trial, disk_full, interrupted, killed, raced

from cushion_deploy.core.host import cpu_description, installed_versions
from cushion_deploy.store.manifest import tool_version

Run = Callable[[SmallBuild, Path, int, int], Iterator[Trial]]
KINDS: dict[str, tuple[Run, int]] = {
    "kill": (killed, 300),
    "signal": (interrupted, 100),
    "race": (raced, 200),
    "disk": (disk_full, 100),
    "flip": (flipped, 2000),
    "mutate": (mutated, 100_000),
}
"""What is done, and how often in a whole run: kills per stage, signals per signal, the others in all."""
PACKAGES = ("torch", "transformers", "onnxruntime", "safetensors", "tokenizers", "gguf")


def main() -> None:
    """Run the kinds and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--share", type=float, default=1.0, help="part of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}; known: {', '.join(KINDS)}")
    stop = Stop()
    import_libraries()
    logging.disable(logging.WARNING)  # a stage that is damaged on purpose is no news
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build = SmallBuild.undisturbed(root / "undisturbed")
        for name in options.kinds or KINDS:
            if stop.number:
                break
            run, whole = KINDS[name]
            began = time.monotonic()
            counted = _count(run(build, root, max(1, round(options.share * whole)), options.seed), stop)
            result[name] = {**counted, "seconds": round(time.monotonic() - began)}
    versions = {"cushion-deploy": tool_version(), **installed_versions(PACKAGES)}
    facts = {"seed": options.seed, "share": options.share, "stopped": bool(stop.number)}
    print(json.dumps({**facts, "cpu": cpu_description(), "versions": versions, "kinds": result}, indent=1))
    sys.exit(any(found["wrong"] for found in result.values()) or (stop.number and 128 + stop.number))


class Stop:
    """Remembers the first SIGINT or SIGTERM, so that no trial is cut off.

    Attributes:
        number: the signal; 0 for none.
    """

    def __init__(self) -> None:
        """Wait for the signals from now on."""
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def _count(trials: Iterator[Trial], stop: Stop) -> dict[str, object]:
    """Return how many trials there were and hit until the end or a signal, by kind, and what was wrong."""
    done: collections.Counter[str] = collections.Counter()
    hit: collections.Counter[str] = collections.Counter()
    wrong: list[dict[str, str]] = []
    for trial in trials:
        done[trial.kind] += 1
        hit[trial.kind] += trial.hit
        if trial.wrong:
            wrong.append({"kind": trial.kind, "wrong": trial.wrong})
            print(f"{trial.kind}: {trial.wrong}", file=sys.stderr, flush=True)
        if stop.number:
            break
    for kind, number in done.items():
        print(f"{kind}: {number} tried, {hit[kind]} struck", file=sys.stderr, flush=True)
    return {"tried": dict(done), "struck": dict(hit), "wrong": wrong}


if __name__ == "__main__":
    main()
