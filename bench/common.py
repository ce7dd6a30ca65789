"""Shared by the benchmarks: options, a pipeline of the real model, and a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cushion_deploy.cli.progress import progress
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore

MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--calib-data", default=None, help="text for calibration and search; default: the offline text")
    parser.add_argument("--work-dir", default=".cushion-work")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def pipeline(options: argparse.Namespace, **overrides: Any) -> Pipeline:
    """Return the pipeline of a build with the same options, so that finished stages of a build are reused."""
    settings = {"model": options.model, "seed": options.seed, "calibration.data": options.calib_data, **overrides}
    return Pipeline.of(Recipe().merged(settings))


def new_run(options: argparse.Namespace) -> Run:
    """Return a run on the work folder."""
    with progress() as report:
        return Run(StageStore(Path(options.work_dir)), report)
