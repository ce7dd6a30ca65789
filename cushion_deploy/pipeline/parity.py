"""The parity stage: climb the ladder for a graph, in a build or for a finished bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.pipeline.prepare import Deployed, read_deployed, require_model_of
from cushion_deploy.pipeline.stages import evaluation_windows, export, export_deployed
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.store import require_space
from cushion_deploy.types import Dtype, EngineArtifact, ExportedGraph, ParityCheck, ParityReport, Site


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
    narrow: Sequence[ExportedGraph] = (),
    *,
    reuse: bool = True,
) -> ParityResult:
    """Return the whole ladder for a graph whose model is at hand.

    Args:
        ws, deployed, graph: what was built.
        narrow: graphs of 16-bit types that engines were compiled from; each has a rung.
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
        "narrow graphs": [written.digest for written in narrow],
    }

    def make(out: Path) -> None:
        with TemporaryDirectory(dir=out) as twin:
            result = _climb(ws, deployed, graph, narrow, corpus.name, Path(twin))
        (out / "parity.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    if reuse:
        data = json.loads((ws.stage("parity", parents, make) / "parity.json").read_text())
    else:
        with TemporaryDirectory(prefix="cushion-parity-") as twin:
            data = _climb(ws, deployed, graph, narrow, corpus.name, Path(twin))
    return ParityResult(read_parity(data["parity"]), data["engine_perplexity"], data["float_bytes"])


def _climb(
    ws: Workspace,
    deployed: Deployed,
    graph: ExportedGraph,
    narrow: Sequence[ExportedGraph],
    corpus: str,
    folder: Path,
) -> dict[str, Any]:
    from cushion_deploy.parity.ladder import (
        decode_rung,
        engine_rung,
        float_rung,
        narrow_rung,
        segment_decode_rung,
        segment_rung,
    )
    from cushion_deploy.parity.reference import float_inputs, linear_codes, torch_reference
    from cushion_deploy.parity.segments import SegmentRun
    from cushion_deploy.parity.written import scale_rung, weight_rung
    from cushion_deploy.runtime.onnxruntime import open_session

    config, model = ws.recipe.parity, ws.folded(deployed.smoothing)
    prefix, scales, scheme = deployed.prefix, deployed.scales, deployed.scheme
    windows, _ = evaluation_windows(ws)
    text = model.encode(ws.corpus(config.data or ws.recipe.evaluation.data, "evaluation").text)
    ids = text[None, : config.tokens]
    tokens = min(config.decode_tokens, ids.shape[1] // 2)
    reference = torch_reference(model, prefix, scales, scheme, ids, windows, ws.progress, ws.model)
    checks: list[ParityCheck] = []
    for written in (graph, *narrow):
        name = "graph" if written is graph else f"{written.contract.dtype} graph"
        checks += scale_rung(f"scales in the {name} against scales.json", written, scales)
        checks += weight_rung(f"weights in the {name} against fake-quant", written, linear_codes(model, scheme))
    require_space(folder, 4 * model.spec.parameters)
    twin = export_deployed(ws, deployed, folder, dtype="float32", name="float", quantized=False, opset=graph.opset)
    checks += float_rung(reference, twin, lambda: float_inputs(model, prefix, ids))
    checks += decode_rung("float graph: decode against prefill", ids, open_session(twin), tokens)
    literal = SegmentRun(graph, scales, "literal")
    checks += segment_rung("canonical ONNX against fake-quant", reference, literal)
    for written in narrow:
        other = SegmentRun(written, scales, "literal")
        rung = f"{written.contract.dtype} graph against the float32 graph"
        checks += narrow_rung(rung, reference, literal, other)
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


def narrow_graphs(graphs: Iterable[ExportedGraph]) -> tuple[ExportedGraph, ...]:
    """Return the graphs of 16-bit types among those that engines are compiled from, each once."""
    return tuple({g.digest: g for g in graphs if g.contract.dtype != "float32"}.values())


def _narrow_behind(ws: Workspace, deployed: Deployed, bundle: Path) -> tuple[ExportedGraph, ...]:
    """Export the 16-bit graphs behind the engines of a bundle again.

    A bundle carries the compiled engines alone. Left out is a graph that the exporter writes otherwise than the engine
    was compiled from (a later version of it): a check of that graph would say nothing of the engine.
    """
    files = [file for name in ENGINES if (file := bundle / "engines" / name / "engine.json").is_file()]
    made = [EngineArtifact.from_json(json.loads(file.read_text())) for file in files]
    types: list[Dtype] = sorted({a.details.get("dtype", "float32") for a in made})
    graphs = narrow_graphs(export(ws, deployed, dtype=t, name=t) for t in types if t != "float32")
    return tuple(g for g in graphs if any(a.parents["graph"] == g.digest for a in made))


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
        narrow = _narrow_behind(ws, deployed, bundle)
        return check_parity(ws, deployed, graph, narrow, reuse=reuse).report
