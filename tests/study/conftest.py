"""A study of the planted model that the tests share, and studies made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.study.cells import Cells
from cushion_deploy.study.document import Study
from cushion_deploy.study.run import choose_parts, run_study

SETTINGS: dict[str, object] = {
    "search.text_tokens": 64,
    "search.random_candidates": 8,
    "search.screen_candidates": 8,
    "search.gradient_candidates": 0,
    "search.audit_tokens": 4,
    "search.average_tokens": 0,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 48,
    "evaluation.max_tokens": 96,
    "tuning.windows": 4,
    "tuning.held_out": 2,
    "tuning.window": 32,
    "tuning.epochs": 1,
    "tuning.judge_every": 2,
    "tuning.learning_rate": 0.01,
}
WORDS = "A head attends to the first token of the text when nothing else is worth attending to; the fox is gone. "
NO_TASKS = "no task was given"


@dataclass(frozen=True)
class Desk:
    """Where studies of a model are made: its folder, two texts, and the options that make a command small."""

    model: Path
    texts: tuple[str, str]
    calibration: str
    recipe: Path

    def cells(self, work: Path, texts: Sequence[str] | None = None, **more: object) -> Cells:
        """Return the cells of a new run."""
        changes = {name.replace("__", "."): value for name, value in more.items()}
        data = {"model": str(self.model), "calibration.data": self.calibration, "evaluation.data": self.texts[0]}
        pipeline = Pipeline.of(Recipe().merged({**SETTINGS, **data, **changes}))
        return Cells(pipeline, Run(StageStore(work)), texts or self.texts)

    @property
    def options(self) -> list[str]:
        """The same as a command line."""
        texts = [word for text in self.texts for word in ("--eval-data", text)]
        return [str(self.model), "--recipe", str(self.recipe), "--calib-data", self.calibration, *texts, "--quiet"]


@pytest.fixture(scope="session")
def desk(planted_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Return where studies of the planted model are made."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (folder / "first.txt").write_text(WORDS * 6)
    (folder / "second.txt").write_text(WORDS.upper() * 6)
    sections: dict[str, list[str]] = {}
    for name, value in SETTINGS.items():
        section, _, setting = name.partition(".")
        sections.setdefault(section, []).append(f"{setting}: {value}")
    lines = [f"{section}: {{{', '.join(values)}}}" for section, values in sections.items()]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    texts = (str(folder / "first.txt"), str(folder / "second.txt"))
    return Desk(planted_folder, texts, str(folder / "calib.txt"), folder / "recipe.yaml")


@dataclass(frozen=True)
class Whole:
    """A finished study, its cells, and the work folder that holds them."""

    study: Study
    cells: Cells
    work: Path


@pytest.fixture(scope="session")
def whole(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a study with every part that needs no lm-eval."""
    work = tmp_path_factory.mktemp("work")
    cells = desk.cells(work)
    return Whole(run_study(cells, choose_parts(()), NO_TASKS), cells, work)


MODEL = {
    "family": "llama",
    "parameters": 1_500_000,
    "source": "maker/small",
    "layers": 2,
    "hidden_size": 8,
    "heads": 2,
    "kv_heads": 1,
    "vocab_size": 50,
    "weights_digest": "d" * 64,
}


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., Study]:
    """Return a function that makes a study on one text, ``wiki``; keywords replace its parts."""

    def make(**parts: Any) -> Study:
        data: dict[str, Any] = {
            "schema": 1,
            "tool": {"version": "1"},
            "created": datetime(2026, 1, 2, tzinfo=timezone.utc),
            "model": MODEL,
            "recipe": {"model": "maker/small"},
            "calibration": "train.txt",
            "prefix": {"token_ids": [7], "tokens": ["\n"], "tuned": False},
            "texts": [{"name": "wiki", "window": 64, "tokens": 1260}],
            "fp": [{"text": "wiki", "perplexity": 20.0, "stderr": 0.5, "divergence": 0.0}],
            "fp_prefix": [{"text": "wiki", "perplexity": 19.0, "stderr": 0.5, "divergence": 0.1}],
            **parts,
        }
        return Study.model_validate(data)

    return make
