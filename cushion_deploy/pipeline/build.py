"""The main job: model in, verified bundle out. Only the composition of the stages."""

from __future__ import annotations

import json
from pathlib import Path

from cushion_deploy.artifacts import PREFIX_FILE, SCALES_FILE, write_prefix, write_scales
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import choose_engines
from cushion_deploy.errors import UsageError, require_modules
from cushion_deploy.pipeline.compiling import compile_engine
from cushion_deploy.pipeline.parity import check_parity
from cushion_deploy.pipeline.reporting import assemble_report
from cushion_deploy.pipeline.stages import calibrate, evaluate, export, model_files, model_spec, search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.report import Report, write_report
from cushion_deploy.store import place, publish, recover, require_publishable, require_space, staging_area


def build(ws: Workspace, output: Path, options: CompileOptions | None = None) -> Report:
    """Build a bundle at ``output`` and return its report; failed parity checks are in the report, not raised.

    Raises:
        CushionError: anything that stops the build; nothing is left at ``output`` then, and finished stages stay
            in the store for the next run.
    """
    options = options or CompileOptions()
    require_modules("torch", "transformers", "onnx_ir", "onnxruntime", "matplotlib", "jinja2")
    recover(output)
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    source = ws.source
    _require_other_text(ws)
    with ws.store.lock():
        # Float32 twice (the model converted from GGUF, the float twin), INT8 twice, one plan: about 14 bytes a
        # parameter. A GGUF file may spend half a byte on one, a folder at least two.
        require_space(ws.store.root, (28 if source.kind == "gguf" else 7) * _bytes(source.path))
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
        parity = check_parity(ws, prefix, calibrated.scales, graph)
        spec = model_spec(ws)
        corpus = ws.corpus(ws.recipe.calibration.data, "calibration").name
        artifacts = [artifact for artifact, _ in compiled]
        report = assemble_report(ws, spec, trace, calibrated, evaluation, graph, artifacts, parity, corpus)
        with staging_area(output) as staged:
            for file in model_files(ws).iterdir():
                if file.name not in ("stage.json", "spec.json"):
                    place(file, staged / file.name)
            # Copied: onnx tools take a second hard link of external data for an attack, and refuse to read it.
            for file in (graph.path, graph.path.with_name(graph.path.name + ".data")):
                place(file, staged / file.name, link=False)
            (staged / "export.json").write_text(json.dumps(graph.to_json(), indent=1) + "\n")
            write_prefix(prefix, staged / PREFIX_FILE)
            write_scales(calibrated.scales, staged / SCALES_FILE)
            for artifact, folder in compiled:
                target = staged / "engines" / artifact.engine
                target.mkdir(parents=True)
                for name in artifact.files:
                    place(folder / name, target / name)
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


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def plan(ws: Workspace, output: Path) -> list[str]:
    """Check the input of a build and return, line by line, what it would do; runs nothing."""
    require_publishable(output)
    engines = choose_engines(ws.recipe.engines)
    corpus = ws.corpus(ws.recipe.calibration.data, "calibration") if ws.recipe.calibration.data != "self" else None
    kept = [p.parent.name for p in sorted(ws.store.root.glob("stages/*/*"))]
    return [
        f"model: {ws.source.label} ({ws.source.kind}, sha256 {ws.source.digest[:12]})",
        f"calibration text: {corpus.name if corpus else 'sampled from the model'}",
        f"stages: load, search, calibrate, export, {', '.join('engine ' + e.name for e in engines)}, "
        "evaluate, parity, report, publish",
        f"finished stages in {ws.store.root}: {', '.join(dict.fromkeys(kept)) or 'none'}",
        f"output: {output}",
    ]
