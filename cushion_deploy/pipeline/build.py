"""The main job: model in, verified bundle out. Only the composition of the stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cushion_deploy.artifacts import PREFIX_FILE, SCALES_FILE, write_prefix, write_scales
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import choose_engines
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.pipeline.compiling import compile_engine
from cushion_deploy.pipeline.limits import longest_prefix, require_positions
from cushion_deploy.pipeline.lookahead import kept_stages, most_parameters, space_needed
from cushion_deploy.pipeline.parity import check_parity, half_graph
from cushion_deploy.pipeline.reporting import assemble_report
from cushion_deploy.pipeline.stages import calibrate, evaluate, export, model_files, model_spec, search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.report import Report, write_report
from cushion_deploy.runtime.bundle import TEXT_NAME
from cushion_deploy.store import place, publish, recover, require_publishable, require_space, staging_area
from cushion_deploy.store.files import human_bytes

LINKED_BYTES = 64 << 20
"""An engine's file of this size or more shares its bytes with the work folder; smaller ones may be edited: copied."""


def build(ws: Workspace, output: Path, *, targets: Sequence[str] = (), allow_float_linears: int = 0) -> Report:
    """Build a bundle at ``output`` and return its report; failed parity checks are in the report, not raised.

    Args:
        ws: one run.
        output: where the bundle shall be.
        targets: engine-specific names such as ``sm86``; empty for the engine's default.
        allow_float_linears: linears that may stay in floating point.

    Raises:
        CushionError: anything that stops the build; nothing is left at ``output`` then, and finished stages stay
            in the store for the next run.
    """
    options = compile_options(ws, targets, allow_float_linears)
    require_modules("torch", "transformers", "onnx_ir", "onnxruntime", "matplotlib", "jinja2")
    recover(output)
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    _require_other_text(ws)
    with ws.store.lock():
        require_space(ws.store.root, space_needed(kept_stages(ws, engines, options), most_parameters(ws)))
        spec = model_spec(ws)
        require_positions(ws.recipe, spec, longest_prefix(ws.recipe))
        prefix, trace = search_prefix(ws)
        calibrated = calibrate(ws, prefix)
        graph = export(ws, prefix, calibrated.scales, dtype="float32")
        compiled = []
        for engine in engines:
            wanted = graph
            if engine.graph_dtype != graph.contract.dtype:
                wanted = export(ws, prefix, calibrated.scales, dtype=engine.graph_dtype, name=engine.graph_dtype)
            compiled.append(compile_engine(ws, engine, wanted, options))
        evaluation = evaluate(ws, prefix, calibrated)
        half = half_graph(ws, prefix, calibrated.scales, engines)
        parity = check_parity(ws, prefix, calibrated.scales, graph, half)
        corpus = ws.corpus(ws.recipe.calibration.data, "calibration").name
        artifacts = [artifact for artifact, _ in compiled]
        report = assemble_report(ws, spec, trace, calibrated, evaluation, graph, artifacts, parity, corpus)
        with staging_area(output) as staged:
            for file in model_files(ws).iterdir():
                if file.name not in ("stage.json", "spec.json"):
                    place(file, staged / file.name, link=False)
            # Copied: onnx tools take a second hard link of external data for an attack, and refuse to read it.
            for file in (graph.path, graph.path.with_name(graph.path.name + ".data")):
                place(file, staged / file.name, link=False)
            (staged / "export.json").write_text(json.dumps(graph.to_json(), indent=1) + "\n")
            # Search, calibration and scoring put text right behind the prefix: it has taken the place of <bos>.
            (staged / TEXT_NAME).write_text(json.dumps({"keep_bos": prefix.length == 0}) + "\n")
            write_prefix(prefix, staged / PREFIX_FILE)
            write_scales(calibrated.scales, staged / SCALES_FILE)
            for artifact, folder in compiled:
                target = staged / "engines" / artifact.engine
                target.mkdir(parents=True)
                for name in artifact.files:
                    place(folder / name, target / name, link=(folder / name).stat().st_size >= LINKED_BYTES)
            (staged / "report").mkdir()
            write_report(report, staged / "report")
            parents = {**graph.parents, "graph": graph.digest}
            publish(staged, output, ws.recipe.model_dump(mode="json"), parents)
    return report


def _require_other_text(ws: Workspace) -> None:
    """Refuse to score the text that the scales were calibrated on."""
    calibration, evaluation = ws.recipe.calibration.data, ws.recipe.evaluation.data
    if calibration == "self" or evaluation is None:
        return
    if ws.corpus(calibration, "calibration").digest == ws.corpus(evaluation, "evaluation").digest:
        raise UsageError(
            f"{evaluation} is the calibration text too, so its perplexity would flatter the result",
            hint="give other text with --eval-data, or leave it out",
        )


def compile_options(ws: Workspace, targets: Sequence[str], allow_float_linears: int) -> CompileOptions:
    """Return what the engines of a build are asked for; the limits are the recipe's."""
    limits = ws.recipe.tensorrt
    return CompileOptions(tuple(targets), limits.max_batch, limits.max_context, allow_float_linears=allow_float_linears)


def plan(ws: Workspace, output: Path, *, targets: Sequence[str] = (), allow_float_linears: int = 0) -> dict[str, Any]:
    """Check the input of a build and return, JSON-ready, what it would do; runs nothing.

    ``stages`` tells for each stage whether an earlier run's result will serve: true, false, or null where that hangs
    on the result of a stage before it.
    """
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    sampled = ws.recipe.calibration.data == "self"
    corpus = None if sampled else ws.corpus(ws.recipe.calibration.data, "calibration").name
    kept = kept_stages(ws, engines, compile_options(ws, targets, allow_float_linears))
    return {
        "model": {"label": ws.source.label, "kind": ws.source.kind, "sha256": ws.source.digest},
        "calibration": corpus or "sampled from the model",
        "engines": [engine.name for engine in engines],
        "stages": [{"stage": stage, "kept": there} for stage, there in kept.items()],
        "space": space_needed(kept, most_parameters(ws)),
        "work_dir": str(ws.store.root),
        "output": str(output),
    }


def plan_lines(found: dict[str, Any]) -> list[str]:
    """Return :func:`plan` as lines for a person."""
    words = {True: "kept from an earlier run", False: "will run", None: "not known beforehand"}
    model = found["model"]
    return [
        f"model: {model['label']} ({model['kind']}, sha256 {model['sha256'][:12]})",
        f"calibration text: {found['calibration']}",
        *(f"stage {row['stage']}: {words[row['kept']]}" for row in found["stages"]),
        f"space: about {human_bytes(found['space'])} to write",
        f"work folder: {found['work_dir']}",
        f"output: {found['output']}",
    ]
