"""Assemble report.json from what the stages left behind."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.host import cpu_description, installed_versions, peak_memory
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.families import get_family
from cushion_deploy.pipeline.parity import ParityResult
from cushion_deploy.pipeline.prepare import Deployed
from cushion_deploy.pipeline.workspace import StageTime, Workspace
from cushion_deploy.prefix.trace import SearchTrace, TuningTrace
from cushion_deploy.report import Report
from cushion_deploy.store.manifest import tool_version

PACKAGES = (
    *("torch", "transformers", "onnx-ir", "numpy"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt"),
)


def assemble_report(
    ws: Workspace,
    spec: ModelSpec,
    trace: SearchTrace | None,
    deployed: Deployed,
    evaluation: dict[str, Any],
    graph: ExportedGraph,
    engines: Sequence[EngineArtifact],
    parity: ParityResult,
) -> Report:
    """Return the report of a build."""
    scales = deployed.scales
    linears = get_family(spec.family).linears(spec, head=True)
    data = {
        "schema": 1,
        "tool": {"version": tool_version()},
        "created": datetime.now(timezone.utc),
        "model": {
            "family": spec.family,
            "parameters": spec.parameters,
            "source": spec.source,
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "heads": spec.num_heads,
            "kv_heads": spec.num_kv_heads,
            "vocab_size": spec.vocab_size,
            "weights_digest": spec.weights_digest,
        },
        "recipe": ws.recipe.model_dump(mode="json"),
        "precision": ws.recipe.precision,
        "perplexity": {**evaluation["perplexity"], "engine": parity.engine_perplexity},
        "search": _search(trace) if trace else None,
        "tuning": _tuning(deployed.tuning) if deployed.tuning else None,
        "magnitudes": evaluation["magnitudes"],
        "calibration": {
            "estimator": scales.estimator,
            "corpus": ws.corpus(ws.recipe.calibration.data, "calibration").name,
            "tokens": scales.tokens,
            "sites": tuple(
                {"site": site, "scale": scale, "amax": deployed.amax[site]} for site, scale in scales.scales.items()
            ),
        },
        "kv_cache": _kv_cache(spec, deployed.kv, evaluation["float_cache"]) if deployed.kv else None,
        "export": {
            "opset": graph.opset,
            "linears": graph.linears,
            "packed_linears": len(graph.sites),
            "quantize_head": ws.recipe.export.quantize_head,
            "bytes": graph.size,
            "float_bytes": parity.float_bytes,
            "rules_checked": graph.rules,
            "float_sites": deployed.scheme.float_sites,
            "float_linears": sum(len(linears[site]) for site in deployed.scheme.float_sites),
        },
        "parity": [c.to_json() for c in parity.report.checks],
        "engines": [engine_row(e) for e in engines],
        "stages": merge_times(ws.times),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": cpu_description(),
            "versions": installed_versions(PACKAGES),
            "peak_rss_bytes": peak_memory(),
        },
    }
    return Report.model_validate(data)


def _tuning(trace: TuningTrace) -> dict[str, Any]:
    return {
        "loss": trace.loss,
        "scales_tuned": trace.scales_tuned,
        "steps": trace.steps,
        "seconds": trace.seconds,
        "kept_step": trace.best.step,
        "skipped": trace.skipped,
        "states": [vars(state) for state in trace.states],
    }


def _kv_cache(spec: ModelSpec, kv: KvScales, float_cache: dict[str, Any]) -> dict[str, Any]:
    values = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    return {
        "scales": kv.granularity,
        "with_prefix": kv.with_prefix,
        "bytes_a_token": values,
        "float32_bytes_a_token": 4 * values,
        "float_perplexity": float_cache["perplexity"],
        "float_divergence": float_cache["divergence"],
    }


def merge_times(times: Sequence[StageTime]) -> list[dict[str, Any]]:
    """Return one row a stage in the order of first use; a stage asked for twice is not counted as reused."""
    rows: dict[str, dict[str, Any]] = {}
    for t in times:
        row = rows.setdefault(t.stage, {"stage": t.stage, "seconds": 0.0, "reused": t.reused})
        row["seconds"] += t.seconds
    return list(rows.values())


def _search(trace: SearchTrace) -> dict[str, Any]:
    return {
        "mode": trace.mode,
        "objective": trace.objective,
        "seed_tokens": trace.seed_tokens,
        "token_ids": trace.token_ids,
        "tokens": trace.tokens,
        "positions_scored": trace.positions_scored,
        "positions_full_scan": trace.positions_full_scan,
        "candidates_scored": sum(step.exact for step in trace.steps),
        "rank_in_random_sample": [
            {"rank": step.audit_rank, "of": step.audit_size} for step in trace.steps if step.audit_size
        ],
        "seconds": trace.seconds,
        "stopped": trace.stopped,
        "steps": [
            {
                "token_id": step.best.token_id,
                "token": step.best.token,
                "source": step.best.source,
                "objective_before": step.before,
                "objective_after": step.best.objective,
                "ratio": step.ratio,
                "accepted": step.accepted,
                "top": [vars(t) for t in step.top],
                "proposed": step.proposed,
                "finalists": step.finalists,
            }
            for step in trace.steps
        ],
    }


def engine_row(artifact: EngineArtifact) -> dict[str, Any]:
    """Return an engine as a report tells it."""
    return {
        "engine": artifact.engine,
        "targets": artifact.targets,
        "linears": artifact.linears,
        "int8_linears": artifact.int8_linears,
        "fused_attention": artifact.fused_attention,
        "ran": artifact.ran,
        "note": str(artifact.details.get("not_run", "")).removeprefix("not run: "),
        "details": {name: value for name, value in artifact.details.items() if name != "command"},
    }
