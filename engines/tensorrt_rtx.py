"""The engine TensorRT-RTX: one ahead-of-time plan for several GPUs, built without one, its INT8 coverage counted."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.plan_report import GraphLinear, PlanReport, read_plan
from cushion_deploy.engines.probe import probe
from cushion_deploy.engines.tensorrt_rtx_worker import PLAN, read_listing, run_worker
from cushion_deploy.errors import CheckFailed, MissingDependency, UsageError
from cushion_deploy.store.files import disk_errors, replace_file, require_space
from cushion_deploy.types import Dtype, EngineArtifact, ExportedGraph, GraphContract, Site, digest_json

DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
TARGETS = (*DEFAULT_TARGETS, "sm121")
"""Ampere, Ada and Blackwell. The library lists no sm87 (Orin), sm90 or sm100."""
REPORT = "engine.json"
INSTALL = "pip install 'cushion-deploy[rtx]'"

_MODULE = "tensorrt_rtx"

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Shapes of an optimization profile: input name to smallest, optimal and largest."""


@dataclass(frozen=True)
class Limits:
    """What the optimization profiles admit, after the model's own limits.

    Attributes:
        batch: largest batch.
        context: longest context, without the prefix.
        prefill: longest piece of prompt in one call.
    """

    batch: int
    context: int
    prefill: int

    @classmethod
    def of(cls, options: CompileOptions, contract: GraphContract) -> Limits:
        """Return the limits of a compilation; positions that the model does not have are left out.

        Raises:
            UsageError: a limit below 1.
        """
        for name in ("max_batch", "max_context", "max_prefill"):
            if getattr(options, name) < 1:
                raise UsageError(f"{name} is {getattr(options, name)}", hint="give at least 1")
        context = min(options.max_context, (contract.cache_capacity or contract.max_positions) - contract.prefix_length)
        if context < 1:
            raise UsageError(
                f"a prefix of {contract.prefix_length} leaves nothing of {contract.max_positions} positions",
                hint="search a shorter prefix",
            )
        return cls(options.max_batch, context, min(options.max_prefill, context))


class TensorRtRtx:
    """TensorRT-RTX: builds here without a GPU; the plan runs on any GPU among its targets.

    The plan is machine code. Only a plan whose digest stands in a trusted manifest may be loaded.
    """

    name = "tensorrt-rtx"
    extra = "rtx"
    graph_dtype: Dtype = "float16"
    in_place_cache = True

    def unavailable(self) -> str | None:
        """Return why nothing can be compiled here, or None. No GPU is needed."""
        found = probe(_MODULE)
        return None if found.importable else found.problem

    def version(self) -> str:
        """Return the version of the library; raises MissingDependency when it is not there."""
        found = probe(_MODULE)
        if not found.importable:
            raise MissingDependency(f"TensorRT-RTX cannot be used: {found.problem}", hint=INSTALL)
        return found.version

    def gpus(self) -> tuple[str, ...]:
        """Return the NVIDIA devices here."""
        return probe(_MODULE).gpus

    def compile(self, graph: ExportedGraph, folder: Path, options: CompileOptions) -> EngineArtifact:
        """Build the plan for every target into ``folder``, with ``engine.json`` beside it.

        Raises:
            MissingDependency: the library is not there.
            UsageError: an unknown target, a limit below 1, a full disk.
            CheckFailed: the parser refuses the graph, the builder fails or crashes, or fewer linears run in INT8
                than ``allow_float_linears`` permits.
        """
        targets = check_targets(options.targets)
        limits = Limits.of(options, graph.contract)
        version = self.version()
        shapes = profiles(graph.contract, limits)
        name = f"{'+'.join(targets)}.engine"
        with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".rtx-", dir=folder) as scratch_name:
            scratch = Path(scratch_name)
            require_space(folder, 2 * graph.size)
            request = {
                "onnx": str(graph.path.resolve()),
                "scratch": str(scratch.resolve()),
                "targets": targets,
                "profiles": list(shapes.values()),
                # A captured step must not allocate.
                "user_allocation": graph.contract.cache_capacity > 0,
            }
            outcome = run_worker(request, scratch)
            plan = read_plan(read_listing(scratch), version)
            linears = graph_linears(outcome["linears"], graph.sites)
            allowed = options.allow_float_linears if graph.quantized else graph.linears
            coverage = check_coverage(plan, linears, allowed, len(shapes))
            artifact = EngineArtifact(
                engine=self.name,
                targets=targets,
                key=compatibility_key(graph, version, targets, shapes, options),
                files=(name, REPORT),
                linears=graph.linears,
                int8_linears=coverage,
                fused_attention=plan.fused_attention,
                ran=False,
                details={
                    **_kernel_details(plan, linears, outcome),
                    "limits": asdict(limits),
                    "profiles": {name: _brief(shape) for name, shape in shapes.items()},
                    "not_run": why_not_run(probe(_MODULE).gpus, targets),
                    "plan_bytes": outcome["plan_bytes"],
                    "build_seconds": outcome["parse_seconds"] + outcome["build_seconds"],
                    "peak_rss_bytes": outcome["peak_rss_bytes"],
                },
                parents={"graph": graph.digest, self.name: version},
            )
            os.replace(scratch / PLAN, folder / name)
            replace_file(folder / REPORT, (json.dumps(artifact.to_json(), indent=1, sort_keys=True) + "\n").encode())
        return artifact


def compatibility_key(
    graph: ExportedGraph, version: str, targets: Sequence[str], shapes: Mapping[str, Shapes], options: CompileOptions
) -> str:
    """Return the digest of everything that a plan depends on: plans of equal inputs differ by some bytes."""
    return digest_json(
        {
            "graph": graph.digest,
            "engine": TensorRtRtx.name,
            "version": version,
            "targets": list(targets),
            "profiles": shapes,
            "options": options.key(),
        }
    )


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Return the targets to build for, in ascending order, without repetition; the default for none.

    Raises:
        UsageError: an unknown target; the hint lists the valid ones.
    """
    chosen = {name.lower() for name in names} or set(DEFAULT_TARGETS)
    for name in sorted(chosen - set(TARGETS)):
        if name == "sm75":
            raise UsageError(
                "target 'sm75' (Turing) is not supported: TensorRT-RTX has no FP32 or BF16 matrix products for it, "
                "and the INT8 linears of this graph are scaled in FP32",
                hint=f"choose among: {', '.join(TARGETS)}",
            )
        raise UsageError(f"unknown target '{name}'", hint=f"choose among: {', '.join(TARGETS)}")
    return tuple(target for target in TARGETS if target in chosen)


def profiles(contract: GraphContract, limits: Limits) -> dict[str, Shapes]:
    """Return the shapes of the optimization profiles ``prefill`` and ``decode``.

    Prefill takes 1 to ``limits.prefill`` tokens after 0 to ``limits.context - 1`` past ones, so that a prompt can
    be cut anywhere; decode takes one token. Every input keeps past + sequence = total at each of the three points.
    A past begins with the prefix where that is not in the graph. A static cache has its capacity at every point.
    """
    capacity = contract.cache_capacity

    def at(batch: int, sequence: int, past: int) -> dict[str, list[int]]:
        past += contract.prefix_slots
        cache = [batch, contract.num_kv_heads, capacity or past, contract.head_dim]
        layers = range(contract.num_layers)
        return {
            "input_ids": [batch, sequence],
            "attention_mask": [batch, capacity or past + sequence],
            "position_ids": [batch, sequence],
            **({"write_indices": [batch]} if capacity else {}),
            **{f"past_key_values.{i}.{part}": cache for i in layers for part in ("key", "value")},
        }

    def between(smallest: dict[str, Any], usual: dict[str, Any], largest: dict[str, Any]) -> Shapes:
        return {name: (smallest[name], usual[name], largest[name]) for name in smallest}

    last, batch, prefill = limits.context - 1, limits.batch, limits.prefill
    return {
        "prefill": between(at(1, 1, 0), at(1, prefill, 0), at(batch, prefill, last)),
        "decode": between(at(1, 1, 0), at(1, 1, last // 2), at(batch, 1, last)),
    }


def graph_linears(found: Sequence[Mapping[str, Any]], sites: Mapping[Site, int]) -> tuple[GraphLinear, ...]:
    """Return the linears of the parsed network that stand behind a Site.

    Args:
        found: products with a constant operand that the worker saw: ``node`` and ``weight`` (name of the constant).
        sites: Sites that the exported graph claims to hold, with the linears packed into each.

    Raises:
        CheckFailed: a Site has no matrix product in the network, or several.
    """
    by_site: dict[Site, list[str]] = {site: [] for site in sites}
    for product in found:
        site = _site_of(product["weight"])
        if site in by_site:
            by_site[site].append(product["node"])
    wrong = [f"{site}: {', '.join(nodes) or 'none'}" for site, nodes in by_site.items() if len(nodes) != 1]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} Sites do not have exactly one matrix product in the network: {'; '.join(wrong[:10])}",
            hint="export the model again; the graph and its description do not belong together",
        )
    return tuple(GraphLinear(nodes[0], site, sites[site]) for site, nodes in by_site.items())


def check_coverage(plan: PlanReport, linears: Sequence[GraphLinear], allowed: int, num_profiles: int) -> int:
    """Return how many linears run in INT8 in every profile, counted before packing.

    Raises:
        CheckFailed: more than ``allowed`` do not, or the plan does not serve ``num_profiles`` profiles.
    """
    if plan.profiles != num_profiles:
        raise CheckFailed(
            f"the plan lists {plan.profiles} optimization profiles, {num_profiles} were asked for",
            hint="report this with the version of TensorRT-RTX",
        )
    expected, found = sum(linear.linears for linear in linears), plan.int8_linears(linears)
    if expected - found > allowed:
        fallbacks = plan.fallbacks(linears)
        raise CheckFailed(
            f"{found} of {expected} linears run in INT8; in floating point: " + "; ".join(map(str, fallbacks[:10])),
            hint=f"check the graph's Q/DQ nodes there, or permit it with --allow-float-linears {expected - found}",
        )
    return found


def why_not_run(gpus: Sequence[str], targets: Sequence[str]) -> str:
    """Return why a plan that was just built has not been executed."""
    if not gpus:
        return "not run: no NVIDIA GPU on this machine"
    if not any(gpu.split(" ", 1)[0] in targets for gpu in gpus):
        return f"not run: {', '.join(gpus)} is none of the targets {', '.join(targets)}"
    return "not run: compilation builds ahead of time and executes nothing"


def _brief(shapes: Shapes) -> Shapes:
    """Return the shapes of a profile with one entry for the caches, which are all alike."""
    plain = {name: shape for name, shape in shapes.items() if not name.startswith("past_key_values.")}
    return {**plain, "past_key_values": shapes["past_key_values.0.key"]}


def _site_of(weight: str) -> Site:
    """Return the Site of a weight, which the exporter names ``<site>.weight_codes`` or ``<site>.weight``."""
    return Site(weight.rpartition(".")[0])


def _kernel_details(plan: PlanReport, linears: Sequence[GraphLinear], outcome: Mapping[str, Any]) -> dict[str, Any]:
    ours = {linear.node for linear in linears}
    return {
        "kernels": len(plan.kernels),
        "int8_gemms": list(plan.int8_gemms),
        "half_accumulators": list(plan.half_accumulators),
        "moves": list(plan.moves),
        "attention_matmuls": len(outcome["attention"]),
        "float_linears": sorted({fallback.linear.site for fallback in plan.fallbacks(linears)}),
        "linears_without_site": [p["node"] for p in outcome["linears"] if p["node"] not in ours],
        "unknown_gemms": list(plan.unknown_gemms([*(p["node"] for p in outcome["linears"]), *outcome["attention"]])),
    }
