"""The parity stage: climb the ladder for a graph, in a build or for a finished bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.parity.checks import ParityCheck, ParityReport
from cushion_deploy.pipeline.prepare import Deployed, read_deployed, require_model_of
from cushion_deploy.pipeline.stages import evaluation_windows, export, export_deployed
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.store import require_space


@dataclass(frozen=True)
class ParityResult:
    """The ladder's report, the engine's own perplexity, and the size of the float twin in bytes."""

    report: ParityReport
    engine_perplexity: float | None
    float_bytes: int


def check_parity(
    ws: Workspace,
    deployed: Deployed,
    graph: ExportedGraph,
    plans: Sequence[ExportedGraph] = (),
    *,
    reuse: bool = True,
) -> ParityResult:
    """Return the whole ladder for a graph whose model is at hand.

    Args:
        ws, deployed, graph: what was built.
        plans: other graphs that engines were compiled from; each has a rung.
        reuse: take a kept result of an earlier run, and keep this one.
    """
    config, evaluation = ws.recipe.parity, ws.recipe.evaluation
    corpus = ws.corpus(config.data or evaluation.data, "evaluation")
    parents = {
        "graph": graph.digest,
        "model": ws.source.digest,
        "scales": deployed.scales.digest,
        "onnxruntime": ENGINES["onnxruntime"].version(),
        "corpus": corpus.digest,
        "perplexity corpus": ws.corpus(evaluation.data, "evaluation").digest,
        "parity": config.model_dump(mode="json", exclude={"data"}),
        "evaluation": evaluation.model_dump(mode="json", exclude={"data"}),
        "plan graphs": [written.digest for written in plans],
    }

    def make(out: Path) -> None:
        with TemporaryDirectory(dir=out) as twin:
            result = _climb(ws, deployed, graph, plans, corpus.name, Path(twin))
        (out / "parity.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    if reuse:
        data = json.loads((ws.stage("parity", parents, make) / "parity.json").read_text())
    else:
        with TemporaryDirectory(prefix="cushion-parity-") as twin:
            data = _climb(ws, deployed, graph, plans, corpus.name, Path(twin))
    return ParityResult(read_parity(data["parity"]), data["engine_perplexity"], data["float_bytes"])


def _climb(
    ws: Workspace,
    deployed: Deployed,
    graph: ExportedGraph,
    plans: Sequence[ExportedGraph],
    corpus: str,
    folder: Path,
) -> dict[str, Any]:
    from cushion_deploy.engines.onnxruntime.session import open_session
    from cushion_deploy.parity.constants import cache_scale_rung, scale_rung, weight_rung
    from cushion_deploy.parity.ladder import (
        decode_rung,
        engine_rung,
        float_rung,
        plan_rung,
        segment_decode_rung,
        segment_rung,
    )
    from cushion_deploy.parity.reference import float_inputs, linear_codes, torch_reference
    from cushion_deploy.parity.segments import SegmentRun

    config, model = ws.recipe.parity, ws.folded(deployed.smoothing)
    prefix, scales, scheme = deployed.prefix, deployed.scales, deployed.scheme
    windows, _ = evaluation_windows(ws)
    text = model.encode(ws.corpus(config.data or ws.recipe.evaluation.data, "evaluation").text)
    ids = text[None, : config.tokens]
    tokens = min(config.decode_tokens, ids.shape[1] // 2)
    reference = torch_reference(ws.model, deployed.quantization, ids, windows, ws.progress)
    checks: list[ParityCheck] = []
    for written in (graph, *plans):
        name = "graph" if written is graph else _kind(written)
        checks += scale_rung(f"scales in the {name} against scales.json", written, scales)
        if deployed.kv:
            checks += cache_scale_rung(f"scales in the {name} against kv_scales.json", written, deployed.kv)
        checks += weight_rung(f"weights in the {name} against fake-quant", written, linear_codes(model, scheme))
    require_space(folder, 4 * model.spec.parameters)
    twin = export_deployed(ws, deployed, folder, dtype="float32", name="float", quantized=False, opset=graph.opset)
    checks += float_rung(reference, twin, lambda: float_inputs(model, prefix, ids))
    checks += decode_rung("float graph: decode against prefill", ids, open_session(twin), tokens)
    literal = SegmentRun(graph, scales, "literal")
    checks += segment_rung("canonical ONNX against fake-quant", reference, literal)
    for written in plans:
        other = SegmentRun(written, scales, "literal")
        rung = f"{_kind(written)} against the float32 graph"
        checks += plan_rung(rung, reference, literal, other)
        if written.contract.cache_capacity:
            checks += segment_decode_rung(f"{_kind(written)}: decode against prefill", reference, other, tokens)
        del other
    del literal
    fused = SegmentRun(graph, scales, "fused")
    segments = segment_rung("onnxruntime kernels against fake-quant", reference, fused)
    checks += segments
    checks += segment_decode_rung("onnxruntime kernels: decode against prefill", reference, fused, tokens)
    del fused
    session = open_session(graph)
    found, engine_perplexity = engine_rung(
        "onnxruntime engine against fake-quant", reference, session, ws.progress, segments
    )
    checks += found
    report = ParityReport(tuple(checks), corpus, int(ids.size))
    return {
        "parity": report.to_json(),
        "engine_perplexity": engine_perplexity if math.isfinite(engine_perplexity) else None,
        "float_bytes": twin.size,
    }


def _kind(graph: ExportedGraph) -> str:
    """Return what a graph of a plan is called: its type, and whether its cache is static."""
    return f"{graph.contract.dtype} graph" + (" with a static cache" if graph.contract.cache_capacity else "")


def distinct_graphs(graphs: Iterable[ExportedGraph], graph: ExportedGraph) -> tuple[ExportedGraph, ...]:
    """Return those that are another graph than the bundle's own, each once."""
    return tuple({g.digest: g for g in graphs if g.digest != graph.digest}.values())


def _graphs_behind(
    ws: Workspace, deployed: Deployed, bundle: Path, graph: ExportedGraph
) -> tuple[tuple[ExportedGraph, ...], tuple[str, ...]]:
    """Export the graphs behind the plans of a bundle again; also say in sentences what cannot be checked.

    A bundle carries the compiled plans alone. Where the exporter writes another graph than the plan was compiled from
    (a later version of it), a check of that graph would say nothing of the plan.
    """
    graphs, unchecked = [], []
    for file in (bundle / "engines" / name / "engine.json" for name in ENGINES):
        artifact = EngineArtifact.from_json(json.loads(file.read_text())) if file.is_file() else None
        if artifact and "not_run" in artifact.details:
            unchecked.append(f"the plan of {artifact.engine} itself was {artifact.details['not_run']}")
        if artifact is None or artifact.lineage.graph == graph.digest:
            continue
        dtype, capacity = artifact.form
        found = export(ws, deployed, dtype=dtype, name=dtype, capacity=capacity)
        if artifact.lineage.graph == found.digest:
            graphs.append(found)
        else:
            unchecked.append(
                f"the graph behind the plan of {artifact.engine} is not checked: this version writes another one; "
                f"compile it again with `cushion-deploy engine`"
            )
    return distinct_graphs(graphs, graph), tuple(unchecked)


def read_parity(data: dict[str, Any]) -> ParityReport:
    """Rebuild a report from its JSON; a value of null is one that was not finite."""
    checks = [
        ParityCheck(
            rung=c["rung"],
            metric=c["metric"],
            value=math.nan if c["value"] is None else c["value"],
            limit=c["limit"],
            direction=c["direction"],
            site=Site(c["site"]) if c["site"] else None,
            note=c["note"],
        )
        for c in data["checks"]
    ]
    return ParityReport(tuple(checks), data["corpus"], data["tokens"])


def check_bundle(ws: Workspace, bundle: Path, graph: ExportedGraph, *, reuse: bool = False) -> ParityReport:
    """Return the ladder's report for a verified bundle.

    Raises:
        UsageError: the model of the bundle is not at hand, or the given one is another model.
    """
    require_model_of(ws, bundle)
    deployed = read_deployed(ws, bundle, graph)
    with ws.store.lock():
        plans, unchecked = _graphs_behind(ws, deployed, bundle, graph)
        report = check_parity(ws, deployed, graph, plans, reuse=reuse).report
    return replace(report, unchecked=unchecked)
