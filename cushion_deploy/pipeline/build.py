"""The main job: model in, verified bundle out. Only the composition of the stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cushion_deploy.calib.corpora import SAMPLED
from cushion_deploy.core.artifacts import SCALES_FILE, SMOOTHING_FILE, write_prefix, write_scales, write_smoothing
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.engines.registry import choose_engines
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.pipeline.compiling import compile_engine, compile_options, place_engine
from cushion_deploy.pipeline.limits import longest_prefix, require_positions
from cushion_deploy.pipeline.parity import check_parity, distinct_graphs
from cushion_deploy.pipeline.prepare import prepare
from cushion_deploy.pipeline.reporting import assemble_report
from cushion_deploy.pipeline.stages import evaluate, export, model_files, model_spec, plan_graph, search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.report import Report, write_report
from cushion_deploy.runtime.bundle import TEXT_NAME
from cushion_deploy.runtime.genai import GENAI_NAME, genai_config
from cushion_deploy.store import place, publish, recover, require_publishable, staging_area


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
    options = compile_options(ws.recipe, targets, allow_float_linears)
    require_modules("torch", "transformers", "onnx_ir", "onnxruntime", "matplotlib", "jinja2")
    recover(output)
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    for engine in engines:
        engine.check(options)
    _require_other_text(ws)
    with ws.store.lock():
        spec = model_spec(ws)
        require_positions(ws.recipe, spec, longest_prefix(ws.recipe))
        found, trace = search_prefix(ws)
        deployed = prepare(ws, found)
        graph = export(ws, deployed, dtype="float32")
        graphs = [plan_graph(ws, deployed, engine, graph, options.max_context) for engine in engines]
        compiled = [compile_engine(ws, engine, of, options) for engine, of in zip(engines, graphs, strict=True)]
        evaluation = evaluate(ws, deployed)
        parity = check_parity(ws, deployed, graph, distinct_graphs(graphs, graph))
        report = assemble_report(
            ws, spec, trace, deployed, evaluation, graph, [artifact for artifact, _ in compiled], parity
        )
        with staging_area(output) as staged:
            for file in model_files(ws).iterdir():
                if file.name not in ("stage.json", "spec.json"):
                    place(file, staged / file.name, link=False)
            # Copied: onnx tools take a second hard link of external data for an attack, and refuse to read it.
            for file in graph.files:
                place(file, staged / file.name, link=False)
            (staged / "export.json").write_text(json.dumps(graph.to_json(), indent=1) + "\n")
            # Search, calibration and scoring put text right behind the prefix: it has taken the place of <bos>.
            (staged / TEXT_NAME).write_text(json.dumps({"keep_bos": deployed.prefix.length == 0}) + "\n")
            if not graph.contract.prefix_slots:  # others begin with an empty cache, and would run without the prefix
                config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
                genai = genai_config(
                    graph.contract, config, spec.eos_token_ids, heads=spec.num_heads, hidden_size=spec.hidden_size
                )
                (staged / GENAI_NAME).write_text(json.dumps(genai, indent=1) + "\n")
                write_prefix(deployed.prefix, staged / PREFIX_FILE)
            write_scales(deployed.scales, staged / SCALES_FILE)
            if deployed.smoothing:
                write_smoothing(deployed.smoothing, staged / SMOOTHING_FILE)
            for artifact, folder in compiled:
                place_engine(artifact, folder, staged)
            (staged / "report").mkdir()
            write_report(report, staged / "report")
            parents = {**graph.lineage.to_json(), "graph": graph.digest}
            publish(staged, output, ws.recipe.model_dump(mode="json"), parents)
    return report


def _require_other_text(ws: Workspace) -> None:
    """Refuse to score the text that the scales were calibrated on."""
    calibration, evaluation = ws.recipe.calibration.data, ws.recipe.evaluation.data
    if calibration in SAMPLED or evaluation is None:
        return
    if ws.corpus(calibration, "calibration").digest == ws.corpus(evaluation, "evaluation").digest:
        raise UsageError(
            f"{evaluation} is the calibration text too, so its perplexity would flatter the result",
            hint="give other text with --eval-data, or leave it out",
        )


def plan(ws: Workspace, output: Path, targets: Sequence[str] = ()) -> dict[str, Any]:
    """Check the input of a build and return, JSON-ready, what it would do; runs nothing."""
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    for engine in engines:
        engine.check(compile_options(ws.recipe, targets, 0))
    calibration = ws.recipe.calibration.data
    corpus = SAMPLED[calibration] if calibration in SAMPLED else ws.corpus(calibration, "calibration").name
    recipe = ws.recipe
    stages = {
        "model": ws.source.kind == "gguf",
        "search": bool(longest_prefix(recipe)),
        "smooth": recipe.smoothing.alpha is not None,
        "calibrate": True,
        "sensitivity": any(wish.startswith("auto:") for wish in recipe.export.keep_float),
        "tune": recipe.tuning.enabled and bool(longest_prefix(recipe)),
        "calibrate-kv": recipe.export.kv_cache == "int8",
        "export": True,
        **{f"engine-{engine.name}": True for engine in engines},
        "evaluate": True,
        "parity": True,
    }
    return {
        "model": {"label": ws.source.label, "kind": ws.source.kind, "sha256": ws.source.digest},
        "calibration": corpus,
        "engines": [engine.name for engine in engines],
        "stages": [stage for stage, wanted in stages.items() if wanted],
        "work_dir": str(ws.store.root),
        "output": str(output),
    }


def plan_lines(found: dict[str, Any]) -> list[str]:
    """Return :func:`plan` as lines for a person."""
    model = found["model"]
    return [
        f"model: {model['label']} ({model['kind']}, sha256 {model['sha256'][:12]})",
        f"calibration text: {found['calibration']}",
        f"stages: {', '.join(found['stages'])}",
        f"work folder: {found['work_dir']} (stages that an earlier run finished there are reused)",
        f"output: {found['output']}",
    ]
