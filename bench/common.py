"""What the benchmarks share: a workspace on the real model, and medians."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cushion_deploy.cli.progress import progress
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.recipe import Recipe
from cushion_deploy.store import StageStore

MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--calib-data", default=None, help="text to calibrate and search on; default: the offline one")
    parser.add_argument("--work-dir", default=".cushion-work")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def workspace(options: argparse.Namespace, **overrides: Any) -> Workspace:
    """Return the workspace that a build with the same options has, so that its stages are shared."""
    settings = {"model": options.model, "seed": options.seed, "calibration.data": options.calib_data, **overrides}
    recipe = Recipe().merged(settings)
    with progress() as report:
        return Workspace(recipe, StageStore(Path(options.work_dir)), report)
