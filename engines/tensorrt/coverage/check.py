"""Check how many linears of the graph run in INT8, by comparing them with the kernels of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cushion_deploy.core.sites import Site
from cushion_deploy.engines.tensorrt.coverage.plan_report import GraphLinear, PlanReport
from cushion_deploy.errors import CheckFailed


def graph_linears(found: Sequence[Mapping[str, Any]], sites: Mapping[Site, int]) -> tuple[GraphLinear, ...]:
    """Return the linears of the parsed network that belong to a Site.

    Args:
        found: products with a constant operand, as the worker found them: ``node``, ``weight`` (name of the constant)
            and ``broken`` (a Q/DQ rule, or empty).
        sites: Sites of the exported graph, with the number of linears packed into each.

    Raises:
        CheckFailed: a Site has no matrix product in the network, or several.
    """
    by_site: dict[Site, list[Mapping[str, Any]]] = {site: [] for site in sites}
    for product in found:
        site = _site_of(product["weight"])
        if site in by_site:
            by_site[site].append(product)
    wrong = [
        f"{site}: {', '.join(product['node'] for product in products) or 'none'}"
        for site, products in by_site.items()
        if len(products) != 1
    ]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} Sites do not have exactly one matrix product in the network: {'; '.join(wrong[:10])}",
            hint="export the model again; the graph does not match its description",
        )
    return tuple(
        GraphLinear(product["node"], site, sites[site], product["broken"]) for site, (product,) in by_site.items()
    )


def check_coverage(plan: PlanReport, linears: Sequence[GraphLinear], allowed: int, num_profiles: int) -> int:
    """Return how many linears run in INT8 in every profile, counted before packing.

    Raises:
        CheckFailed: more than ``allowed`` do not, or the plan does not have ``num_profiles`` profiles.
    """
    if plan.profiles != num_profiles:
        raise CheckFailed(
            f"the plan lists {plan.profiles} optimization profiles, {num_profiles} were asked for",
            hint="report this with the version of TensorRT",
        )
    expected, found = sum(linear.linears for linear in linears), plan.int8_linears(linears)
    if expected - found > allowed:
        fallbacks = plan.fallbacks(linears)
        raise CheckFailed(
            f"{found} of {expected} linears run in INT8; in floating point: " + "; ".join(map(str, fallbacks[:10])),
            hint=f"check the Q/DQ nodes of these linears, or permit it with --allow-float-linears {expected - found}",
        )
    return found


def coverage_details(plan: PlanReport, linears: Sequence[GraphLinear], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further facts of a plan report, JSON-ready; ``outcome`` is that of the worker."""
    ours = {linear.node for linear in linears}
    # The float32 graph keeps a baked prefix separate: its products have a constant operand and still are attention.
    prefix = [p["node"] for p in outcome["linears"] if p["weight"].startswith("prefix.")]
    fallbacks = plan.fallbacks(linears)
    return {
        "kernels": len(plan.kernels),
        "int8_gemms": list(plan.int8_gemms),
        "half_accumulators": list(plan.half_accumulators),
        "moves": list(plan.moves),
        "attention_matmuls": len(outcome["attention"]) + len(prefix),
        "float_linears": sorted({fallback.linear.site for fallback in fallbacks}),
        "fallbacks": [fallback.to_json() for fallback in fallbacks],
        "linears_without_site": [p["node"] for p in outcome["linears"] if p["node"] not in {*ours, *prefix}],
        "unknown_gemms": list(plan.unknown_gemms([*(p["node"] for p in outcome["linears"]), *outcome["attention"]])),
    }


def _site_of(weight: str) -> Site:
    """Return the Site of a weight; the exporter names it ``<site>.weight_codes`` or ``<site>.weight``."""
    return Site(weight.rpartition(".")[0])
