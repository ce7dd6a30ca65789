"""Build: turn a model into a verified bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cushion_deploy.calib.corpora import SAMPLED
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.engines.registry import choose_engines
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.stages.base import Stage, nodes_behind
from cushion_deploy.stages.compile import Compile, compile_options
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.publish import Publish
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.windows import require_recipe_fits
from cushion_deploy.store import recover, require_publishable


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
    require_modules("torch", "transformers", "onnx_ir", "onnxruntime", "matplotlib", "jinja2")
    recover(output)
    pipeline, end = _checked(recipe, output, targets, allow_float_linears, run.progress)
    _require_other_text(pipeline, run)
    with run.lock():
        run.number(end)
        require_recipe_fits(recipe, run.get(pipeline.files).spec)
        return run.get(end)


def dry_run(recipe: Recipe, run: Run, output: Path, targets: Sequence[str] = ()) -> dict[str, Any]:
    """Check the inputs of a build and return, JSON-ready, what it would do, without running anything."""
    pipeline, end = _checked(recipe, output, targets, 0, run.progress)
    data, source = recipe.calibration.data, pipeline.source
    text = SAMPLED[data] if data in SAMPLED else run.get(pipeline.text).name
    stages = [node.label for node in nodes_behind(end) if isinstance(node, Stage)]
    return {
        "model": {"label": source.label, "kind": source.kind, "sha256": source.digest},
        "calibration": text,
        "engines": [stage.engine for stage in end.engines if isinstance(stage, Compile)],
        "stages": list(dict.fromkeys(stages)),
        "work_dir": str(run.store.root),
        "output": str(output),
    }


def dry_run_lines(found: dict[str, Any]) -> list[str]:
    """Return the result of :func:`dry_run` as lines of text."""
    model = found["model"]
    return [
        f"model: {model['label']} ({model['kind']}, sha256 {model['sha256'][:12]})",
        f"calibration text: {found['calibration']}",
        f"stages: {', '.join(found['stages'])}",
        f"work folder: {found['work_dir']} (stages that an earlier run finished there are reused)",
        f"output: {found['output']}",
    ]


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


def _require_other_text(pipeline: Pipeline, run: Run) -> None:
    """Refuse to evaluate on the calibration text."""
    calibration, evaluation = pipeline.recipe.calibration.data, pipeline.recipe.evaluation.data
    if calibration in SAMPLED or evaluation is None:
        return
    if run.digest(pipeline.text) == run.digest(pipeline.evaluation_text):
        raise UsageError(
            f"{evaluation} is also the calibration text, so its perplexity would be too optimistic",
            hint="give a different text with --eval-data, or omit the option",
        )
