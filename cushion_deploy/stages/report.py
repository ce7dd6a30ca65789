"""Report: assemble the results of the stages into report.json."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.host import cpu_description, installed_versions, peak_memory
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.value_range import MARGIN, PlanType
from cushion_deploy.families import get_family
from cushion_deploy.prefix.trace import SearchTrace, TuningTrace
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.calibrate import CalibratedScales
from cushion_deploy.stages.choose import Choice
from cushion_deploy.stages.compile import CompiledEngine
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.parity import EngineScore, ParityResult
from cushion_deploy.stages.run import Inputs, StageTime
from cushion_deploy.stages.search import FoundPrefix
from cushion_deploy.stages.tune import TunedPrefix
from cushion_deploy.stages.windows import default_window
from cushion_deploy.store.manifest import tool_version

PACKAGES = (
    *("torch", "transformers", "onnx-ir", "numpy"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx-cu13", "tensorrt"),
)


@dataclass(frozen=True)
class AssembleReport(Derived[Report]):
    """The report of a build.

    Attributes:
        recipe: every setting.
        files, text, search, calibration, tuning, choice, quantization, graph, plan_type, engines, evaluation, parity:
            what to report; ``search``, ``tuning`` and ``choice`` are None if the recipe disables them, ``plan_type`` if
            no plan is compiled.
    """

    recipe: Recipe
    files: Node[ModelFiles]
    text: Node[Corpus]
    search: Node[FoundPrefix] | None
    calibration: Node[CalibratedScales]
    tuning: Node[TunedPrefix] | None
    choice: Node[Choice] | None
    quantization: Node[Quantization]
    graph: Node[ExportedGraph]
    plan_type: Node[PlanType] | None
    engines: tuple[Node[CompiledEngine], ...]
    evaluation: Node[dict[str, Any]]
    parity: Node[ParityResult]

    def make(self, inputs: Inputs) -> Report:
        """Return the report; its times cover every stage of the run so far."""
        # In this order, so that a failing compilation ends the build before the model is evaluated.
        for node in self.inputs.values():
            inputs.get(node)
        spec, parity = inputs.get(self.files).spec, inputs.get(self.parity)
        quantization, evaluation = inputs.get(self.quantization), inputs.get(self.evaluation)
        trace = inputs.get(self.tuning).trace if self.tuning else None
        kv = quantization.kv_scales
        engines, scores = [inputs.get(engine).artifact for engine in self.engines], parity.engines
        data = {
            "schema": 1,
            "tool": {"version": tool_version()},
            "created": datetime.now(timezone.utc),
            "model": model_row(spec),
            "recipe": self.recipe.model_dump(mode="json"),
            "precision": self.recipe.precision,
            "perplexity": {
                **evaluation["perplexity"],
                "engine": parity.engine_perplexity,
                "engine_stderr": parity.engine_stderr,
            },
            "chat": evaluation["chat"],
            "search": _search(inputs.get(self.search).trace) if self.search else None,
            "tuning": _tuning(trace) if trace else None,
            "choice": asdict(inputs.get(self.choice)) if self.choice else None,
            "magnitudes": evaluation["magnitudes"],
            "calibration": self._calibration(inputs, quantization, spec),
            "kv_cache": _kv_cache(spec, kv, evaluation["float_cache"]) if kv else None,
            "export": self._export(inputs.get(self.graph), quantization, spec, parity),
            "parity": [c.to_json() for c in parity.report.checks],
            "unchecked": list(parity.report.unchecked),
            "plan_type": plan_type_row(inputs.get(self.plan_type)) if self.plan_type else None,
            "engines": [engine_row(found, scores.get(found.engine)) for found in engines],
            "stages": merge_times(inputs.run.times),
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cpu": cpu_description(),
                "versions": installed_versions(PACKAGES),
                "peak_rss_bytes": peak_memory(),
                "peak_device_bytes": _device_peak(inputs.run.times),
            },
        }
        return Report.model_validate(data)

    def _calibration(self, inputs: Inputs, quantization: Quantization, spec: ModelSpec) -> dict[str, Any]:
        scales, amax = quantization.static_scales, inputs.get(self.calibration).amax
        smoothing = quantization.smoothing
        rotations = smoothing.rotations if smoothing else {}
        return {
            "smoothing_alpha": smoothing.alpha if smoothing else None,
            "rotations": {site.split(".", 2)[2]: block for site, block in rotations.items()},
            "estimator": scales.estimator,
            "corpus": inputs.get(self.text).name,
            "tokens": scales.tokens,
            "window": self.recipe.calibration.window or default_window(spec),
            "sliding_window": spec.smallest_window or None,
            "sites": tuple({"site": site, "scale": scale, "amax": amax[site]} for site, scale in scales.scales.items()),
        }

    def _export(
        self, graph: ExportedGraph, quantization: Quantization, spec: ModelSpec, parity: ParityResult
    ) -> dict[str, Any]:
        linears, float_sites = get_family(spec.family).linears(spec, head=True), quantization.scheme.float_sites
        return {
            "opset": graph.opset,
            "linears": graph.linears,
            "packed_linears": len(graph.sites),
            "quantize_head": self.recipe.export.quantize_head,
            "bytes": graph.size,
            "float_bytes": parity.float_bytes,
            "rules_checked": graph.rules,
            "float_sites": float_sites,
            "float_linears": sum(len(linears[site]) for site in float_sites),
        }


def _device_peak(times: Sequence[StageTime]) -> int | None:
    """Return the largest memory that torch allocated on the GPU in this process; None if no stage ran on one."""
    gpus = [t.ran_on.partition(" ")[0] for t in times if t.ran_on.startswith("cuda") and not t.reused]
    if not gpus:
        return None
    from cushion_deploy.modeling.devices import peak_bytes, resolve_device

    return peak_bytes(resolve_device(gpus[0]))


def model_row(spec: ModelSpec) -> dict[str, Any]:
    """Return the description of a model in a report, JSON-ready."""
    return {
        "family": spec.family,
        "parameters": spec.parameters,
        "source": spec.source,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "weights_digest": spec.weights_digest,
    }


def plan_type_row(found: PlanType) -> dict[str, Any]:
    """Return the description of the type of plans in a report, JSON-ready."""
    measured = found.measured.to_json() if found.measured else {}
    return {"dtype": found.dtype, "wanted": found.wanted, "margin": MARGIN, **measured}


def engine_row(artifact: EngineArtifact, score: EngineScore | None = None) -> dict[str, Any]:
    """Return the description of an engine in a report, with its score on the parity ladder, JSON-ready."""
    return {
        "engine": artifact.engine,
        "targets": artifact.targets,
        "linears": artifact.linears,
        "int8_linears": artifact.int8_linears,
        "fused_attention": artifact.fused_attention,
        "ran": artifact.ran,
        "perplexity": score.perplexity if score else None,
        "stderr": score.stderr if score else None,
        "note": str(artifact.details.get("not_run", "")).removeprefix("not run: "),
        "details": {name: value for name, value in artifact.details.items() if name != "command"},
    }


def merge_times(times: Sequence[StageTime]) -> list[dict[str, Any]]:
    """Return one row per stage, in order of first use; a stage that is requested twice does not count as reused."""
    rows: dict[str, dict[str, Any]] = {}
    for t in times:
        row = rows.setdefault(t.stage, {"stage": t.stage, "seconds": 0.0, "reused": t.reused, "ran_on": t.ran_on})
        row["seconds"] += t.seconds
    return list(rows.values())


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
        **{f"float_{name}": value for name, value in float_cache.items()},
    }


def _search(trace: SearchTrace) -> dict[str, Any]:
    return {
        "mode": trace.mode,
        "objective": trace.objective,
        "bits": trace.bits,
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
        "averaging": {**asdict(trace.averaging), "kept": trace.averaging.kept} if trace.averaging else None,
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
                "screened": step.screened,
            }
            for step in trace.steps
        ],
    }
