"""Build: turn a model into a verified bundle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cushion_deploy.calib.corpora import SAMPLED
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.engines.registry import choose_engines
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.stages.compile import Compile, compile_options
from cushion_deploy.stages.convert import Convert
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.plan import NotFinished, PlannedStage, ReadOnlyRun
from cushion_deploy.stages.publish import Publish
from cushion_deploy.stages.requirements import (
    require_calibration_text,
    require_comparable,
    require_evaluable,
    require_settings,
)
from cushion_deploy.stages.run import Inputs, Run
from cushion_deploy.store import recover, require_publishable, require_space

LIBRARIES = ("torch", "transformers", "onnx_ir", "onnxruntime", "matplotlib", "jinja2")
"""Modules that every build needs, by import name."""


def build(
    recipe: Recipe, run: Run, output: Path, *, targets: Sequence[str] = (), allow_float_linears: int = 0
) -> Report:
    """Build a bundle at ``output`` and return its report; failed parity checks are reported, not raised.

    Args:
        recipe: every setting.
        run: the work folder, and the receiver of progress.
        output: folder of the bundle.
        targets: engine-specific names such as ``sm86``; empty for the engine's default.
        allow_float_linears: linears that may stay in floating point.

    Raises:
        CushionError: the build cannot be completed; nothing is left at ``output``, and finished stages stay in the
            work folder for the next run.
    """
    require_modules(*LIBRARIES)
    recover(output)
    pipeline, end = _checked(recipe, output, targets, allow_float_linears, run.progress)
    _read_texts(pipeline, run)
    with run.lock():
        run.number(end)
        require_settings(pipeline, run)
        require_evaluable(pipeline, run, [recipe.evaluation.data])
        require_comparable(pipeline, run)
        # Last, because the text may have to be sampled.
        require_calibration_text(pipeline, run)
        return run.get(end)


def dry_run(
    recipe: Recipe, run: Run, output: Path, *, targets: Sequence[str] = (), allow_float_linears: int = 0
) -> dict[str, Any]:
    """Make every check of a build that needs no computation, and return what the build would do, JSON-ready.

    Nothing is written, and no model is loaded. What depends on stages that are not finished is checked by the build
    itself, before it runs anything else.

    Raises:
        CushionError: the build would end with the same error.
    """
    require_modules(*LIBRARIES)
    pipeline, end = _checked(recipe, output, targets, allow_float_linears, run.progress)
    if recipe.compute.device not in ("auto", "cpu"):
        from cushion_deploy.modeling.devices import resolve_device

        resolve_device(recipe.compute.device)
    found = ReadOnlyRun.of(run)
    _read_texts(pipeline, found)
    files = found.known(pipeline.files)
    if files:
        require_settings(pipeline, found)
        with suppress(NotFinished):  # each of these texts may have to be sampled from the model
            require_evaluable(pipeline, found, [recipe.evaluation.data])
        with suppress(NotFinished):
            require_comparable(pipeline, found)
        with suppress(NotFinished):
            require_calibration_text(pipeline, found)
    stages = found.plan(end)
    _require_room(stages, files.spec if files else None, run)
    data, source = recipe.calibration.data, pipeline.source
    return {
        "model": {"label": source.label, "kind": source.kind, "sha256": source.digest},
        "calibration": SAMPLED[data] if data in SAMPLED else found.get(pipeline.text.rows).name,
        "engines": [stage.engine for stage in end.engines if isinstance(stage, Compile)],
        "stages": [stage.to_json() for stage in stages],
        "work_dir": str(run.store.root),
        "output": str(output),
    }


def dry_run_lines(found: dict[str, Any]) -> list[str]:
    """Return the result of :func:`dry_run` as lines of text."""
    model, stages = found["model"], found["stages"]
    finished = sum(stage["finished"] for stage in stages)
    width = max(len(stage["stage"]) for stage in stages)
    return [
        f"model: {model['label']} ({model['kind']}, sha256 {model['sha256'][:12]})",
        f"calibration text: {found['calibration']}",
        f"engines: {', '.join(found['engines']) or 'none'}",
        f"work folder: {found['work_dir']}",
        f"output: {found['output']}",
        f"stages: {finished} of {len(stages)} are finished in the work folder and will be reused",
        *(f"  {stage['stage']:{width}}  {_state(stage)}" for stage in stages),
    ]


def _state(stage: dict[str, Any]) -> str:
    """Return in words what a build does about a stage."""
    if stage["if_needed"]:
        return "to run if needed"
    return "finished" if stage["finished"] else "to run"


def _require_room(stages: Sequence[PlannedStage], spec: ModelSpec | None, run: Run) -> None:
    """Check that the disk has room for the stages that would run; of a model not yet read, only its conversion."""
    to_run = [planned.node for planned in stages if not planned.finished]
    if spec is not None:
        require_space(run.store.root, sum(node.disk(spec) for node in to_run))
        return
    for node in to_run:
        if isinstance(node, Convert):
            require_space(run.store.root, node.room(Inputs(run, node)))


def _checked(
    recipe: Recipe, output: Path, targets: Sequence[str], allow_float_linears: int, progress: Progress
) -> tuple[Pipeline, Publish]:
    """Return the pipeline and its final node, after checking the output folder, the engines and the targets."""
    require_publishable(output)
    options = compile_options(recipe, tuple(targets), allow_float_linears)
    engines = choose_engines(recipe.engines)
    for engine in engines:
        engine.check(options)
    with elapsed(progress, f"reading {recipe.model}"):
        pipeline = Pipeline.of(recipe)
    return pipeline, pipeline.build(tuple(engine.name for engine in engines), options, output)


def _read_texts(pipeline: Pipeline, run: Run) -> None:
    """Read the texts that need no model, so that a bad one is found at once; refuse the calibration text twice.

    What is sampled from the model is the same text wherever it is used.
    """
    recipe = pipeline.recipe
    calibration, evaluation = recipe.calibration.data, recipe.evaluation.data
    texts = pipeline.text, pipeline.evaluation_text, pipeline.corpus(recipe.parity.data, "evaluation")
    for data, text in zip((calibration, evaluation, recipe.parity.data), texts, strict=True):
        if data not in SAMPLED:
            run.get(text.rows)
    if evaluation is None:
        return
    sampled = calibration in SAMPLED, evaluation in SAMPLED
    if all(sampled) or (
        not any(sampled) and run.digest(pipeline.text.rows) == run.digest(pipeline.evaluation_text.rows)
    ):
        whole = "the" if calibration else "part of the"
        raise UsageError(
            f"{evaluation} is also {whole} calibration text, so its perplexity would be too optimistic",
            hint="give a different text with --eval-data, or omit the option",
        )
