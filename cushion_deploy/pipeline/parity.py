"""The parity stage: climb the ladder for a graph, in a build or for a finished bundle."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cushion_deploy.artifacts import PREFIX_FILE, SCALES_FILE, read_prefix, read_scales
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UsageError
from cushion_deploy.pipeline.stages import evaluation_windows
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.types import ActivationScales, ExportedGraph, ParityCheck, ParityReport, Prefix, Site


@dataclass(frozen=True)
class ParityResult:
    """The ladder's report, the engine's own perplexity, and the size of the float twin in bytes."""

    report: ParityReport
    engine_perplexity: float | None
    float_bytes: int


def check_parity(
    ws: Workspace, prefix: Prefix, scales: ActivationScales, graph: ExportedGraph, *, reuse: bool = True
) -> ParityResult:
    """Return the whole ladder for a graph whose model is at hand.

    Args:
        ws, prefix, scales, graph: what was built.
        reuse: take a kept result of an earlier run, and keep this one.
    """
    config, evaluation = ws.recipe.parity, ws.recipe.evaluation
    corpus = ws.corpus(config.data or evaluation.data, "evaluation")
    parents = {
        "graph": graph.digest,
        "model": ws.source.digest,
        "scales": scales.digest,
        "onnxruntime": ENGINES["onnxruntime"].version(),
        "corpus": corpus.digest,
        "perplexity corpus": ws.corpus(evaluation.data, "evaluation").digest,
        "parity": config.model_dump(mode="json", exclude={"data"}),
        "evaluation": evaluation.model_dump(mode="json", exclude={"data"}),
    }

    def make(out: Path) -> None:
        with TemporaryDirectory(dir=out) as twin:
            result = _climb(ws, prefix, scales, graph, corpus.name, Path(twin))
        (out / "parity.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    if reuse:
        data = json.loads((ws.stage("parity", parents, make) / "parity.json").read_text())
    else:
        with TemporaryDirectory(prefix="cushion-parity-") as twin:
            data = _climb(ws, prefix, scales, graph, corpus.name, Path(twin))
    return ParityResult(read_parity(data["parity"]), data["engine_perplexity"], data["float_bytes"])


def _climb(
    ws: Workspace, prefix: Prefix, scales: ActivationScales, graph: ExportedGraph, corpus: str, folder: Path
) -> dict[str, Any]:
    from cushion_deploy.export.folder import export_graph
    from cushion_deploy.parity.ladder import decode_rung, engine_rung, float_rung, segment_decode_rung, segment_rung
    from cushion_deploy.parity.reference import torch_reference
    from cushion_deploy.parity.segments import SegmentRun
    from cushion_deploy.runtime.session import OnnxRuntimeSession

    config, model = ws.recipe.parity, ws.model
    windows, _ = evaluation_windows(ws)
    text = model.encode(ws.corpus(config.data or ws.recipe.evaluation.data, "evaluation").text)
    ids = text[None, : config.tokens]
    tokens = min(config.decode_tokens, ids.shape[1] // 2)
    reference = torch_reference(model, prefix, scales, ws.scheme, ids, windows, ws.progress)
    checks: list[ParityCheck] = []
    twin = export_graph(model.spec, model.weights, prefix, None, ws.scheme, folder, name="float")
    float_bytes = sum(f.stat().st_size for f in folder.iterdir())
    checks += float_rung(reference, twin)
    checks += decode_rung(
        "float graph: decode against prefill", ids, OnnxRuntimeSession(twin.path, twin.contract), tokens
    )
    checks += segment_rung("canonical ONNX against fake-quant", reference, SegmentRun(graph, scales, "literal"))
    fused = SegmentRun(graph, scales, "fused")
    checks += segment_rung("onnxruntime kernels against fake-quant", reference, fused)
    checks += segment_decode_rung("onnxruntime kernels: decode against prefill", reference, fused, tokens)
    del fused
    session = OnnxRuntimeSession(graph.path, graph.contract)
    found, engine_perplexity = engine_rung("onnxruntime engine against fake-quant", reference, session, ws.progress)
    checks += found
    report = ParityReport(tuple(checks), corpus, int(ids.size))
    return {
        "parity": report.to_json(),
        "engine_perplexity": engine_perplexity if math.isfinite(engine_perplexity) else None,
        "float_bytes": float_bytes,
    }


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
    scales, prefix = read_scales(bundle / SCALES_FILE), read_prefix(bundle / PREFIX_FILE)
    if ws.source.digest != scales.model_digest:
        raise UsageError(
            f"{ws.source.label} is not the model that the bundle was built from",
            hint="give the original with --model",
        )
    with ws.store.lock():
        return check_parity(ws, prefix, scales, graph, reuse=reuse).report
