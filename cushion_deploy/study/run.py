"""Run a study: measure the cells of every table and figure, and gather them into a Study."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from cushion_deploy.core.host import installed_versions
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ESTIMATORS
from cushion_deploy.core.schemes import PRECISIONS, QuantScheme
from cushion_deploy.errors import unknown_choice
from cushion_deploy.stages.report import model_row
from cushion_deploy.store.manifest import tool_version
from cushion_deploy.study.cells import UNROTATED, Cells
from cushion_deploy.study.document import PARTS, Pair, Score, Step, Study, TaskPair
from cushion_deploy.study.stages import Variant
from cushion_deploy.study.zeroshot import Tasks

LIBRARIES = ("torch", "transformers", "gguf", "numpy", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tokenizers")
"""Libraries whose versions a study records."""
W8A8 = {
    "naive-o3": "per-tensor static",
    "smoothquant-o3": "SmoothQuant-O3 (per-tensor static)",
    "naive-o2": "per-tensor dynamic",
    "smoothquant-o2": "SmoothQuant-O2 (per-tensor dynamic)",
    "naive-o1": "per-token dynamic",
    "smoothquant-o1": "SmoothQuant-O1 (per-token dynamic)",
}
"""Schemes of Tables 1 and 2, with their names in the paper."""
LOW_BITS = {
    "naive-w6a6": "W6A6 per-token",
    "smoothquant-w6a6": "SmoothQuant W6A6 per-token",
    "naive-w4a4": "W4A4 per-token",
    "smoothquant-w4a4": "SmoothQuant W4A4 per-token",
}
ROTATED = {
    "smoothquant-w6a6": "the same W6A6, inputs rotated",
    "smoothquant-w4a4": "the same W4A4, inputs rotated",
}
"""Schemes of Table 4 that are also measured with the rotations of the recipe, which the paper does not have."""
AVERAGED = "+ averaged first position"
DEPLOYED = "deployed: static W8A8 of the recipe"
FALLBACK_ALPHA = 0.5
"""Alpha of the smoothing remedy if the recipe itself disables smoothing."""
KEPT_FLOAT = "auto:4"
NO_PREFIX = "the model runs without a prefix: the search found none that pays, or the recipe disables it"
PLAIN: dict[str, Any] = {"tuning.enabled": False, "export.keep_float": []}

Parts = dict[str, Any]


def choose_parts(wanted: Collection[str]) -> tuple[str, ...]:
    """Return the parts in their canonical order, or all if none is named; raises UsageError for an unknown part."""
    for name in wanted:
        if name not in PARTS:
            raise unknown_choice("part of a study", name, list(PARTS))
    return tuple(name for name in PARTS if not wanted or name in wanted)


def run_study(cells: Cells, parts: Collection[str], tasks: Tasks | str) -> Study:
    """Measure the missing cells of every part and return the study.

    Args:
        cells: the measurements.
        parts: result of :func:`choose_parts`.
        tasks: tasks for Table 2, or the reason why there are none.

    Raises:
        UsageError: a text is too short or too long for the model.
    """
    left_out: dict[str, str] = {}
    found: Parts = {}
    if set(parts) & {"table1", "table3", "remedies", "table4"}:
        found["fp"] = cells.scores("FP", Variant(cells.empty))
        if cells.prefix.length:
            found["fp_prefix"] = cells.scores("FP, with the prefix", Variant(cells.prefix))
        found["texts"] = [cells.described(text) for text in cells.texts]
    for name in parts:
        if name == "table2" and isinstance(tasks, str):
            left_out[name] = tasks
        elif name == "table2" and not isinstance(tasks, str):
            found |= {name: _table2(cells, tasks), "task_limit": tasks.limit}
        elif name in ("table3", "remedies") and not cells.searched.length:
            left_out[name] = NO_PREFIX
        else:
            found[name] = _MAKERS[name](cells)
    return _document(cells, found, left_out)


def _table1(cells: Cells) -> list[Pair]:
    return [*(_pair(cells, label, name) for name, label in W8A8.items()), _deployed_pair(cells)]


def _table4(cells: Cells) -> list[Pair]:
    rotated = ROTATED if cells.pipeline.recipe.smoothing.rotates else {}
    return [
        *(_pair(cells, label, name) for name, label in LOW_BITS.items()),
        *(_pair(cells, label, name, rotated=True) for name, label in rotated.items()),
    ]


def _pair(cells: Cells, label: str, name: str, *, rotated: bool = False) -> Pair:
    bare = cells.in_scheme(name, cells.empty, rotated=rotated)
    without = cells.scores(label, bare)
    behind: tuple[Score, ...] = ()
    own = cells.of_bits(_scheme(bare))
    if own.prefix.length:
        behind = cells.scores(f"{label}, with the prefix", cells.in_scheme(name, own.prefix, rotated=rotated))
    return Pair(
        label=label,
        scheme=_scheme(bare).name,
        smoothing_alpha=bare.smoothing.alpha if bare.smoothing else None,
        rotated=rotated,
        without=without,
        with_prefix=behind,
        **(_own_prefix(own) if own.prefix.digest != cells.prefix.digest else {}),
    )


def _own_prefix(cells: Cells) -> Parts:
    """Return what a row says about a prefix that is not that of the study."""
    found: Parts = {"prefix": _prefix_in_use(cells)}
    if cells.prefix.length:
        label = f"FP, with the prefix for {cells.pipeline.recipe.search.bits} bits"
        found["fp_prefix"] = cells.scores(label, Variant(cells.prefix))
    return found


def _prefix_in_use(cells: Cells) -> Parts:
    trace, prefix = cells.trace, cells.prefix
    return {
        "token_ids": prefix.token_ids,
        "tokens": trace.tokens if trace else (),
        "averaged": trace.averaged if trace else False,
        "tuned": cells.pipeline.recipe.tuning.enabled and prefix.length > 0,
    }


def _deployed_pair(cells: Cells) -> Pair:
    bare = cells.built(cells.empty)
    smoothing = bare.quantization.smoothing
    without = cells.scores(DEPLOYED, bare.variant)
    behind: tuple[Score, ...] = ()
    if cells.searched.length:
        behind = cells.scores(f"{DEPLOYED}, with the prefix", cells.built(cells.searched).variant)
    return Pair(
        label=DEPLOYED,
        scheme=bare.quantization.scheme.name,
        deployable=True,
        smoothing_alpha=smoothing.alpha if smoothing else None,
        without=without,
        with_prefix=behind,
    )


def _table2(cells: Cells, tasks: Tasks) -> list[TaskPair]:
    def pair(label: str, bare: Variant, behind: Variant | None) -> TaskPair:
        return TaskPair(
            label=label,
            scheme=bare.scheme.name if bare.scheme else None,
            without=tasks.scores(cells, label, bare),
            with_prefix=tasks.scores(cells, f"{label}, with the prefix", behind) if behind else (),
        )

    def behind(variant: Variant) -> Variant | None:
        return variant if variant.prefix.length else None

    rows = [pair("FP", Variant(cells.empty), behind(Variant(cells.prefix)))]
    for name, label in W8A8.items():
        rows.append(pair(label, cells.in_scheme(name, cells.empty), behind(cells.in_scheme(name, cells.prefix))))
    rows.append(pair(DEPLOYED, cells.built(cells.empty).variant, behind(cells.built(cells.searched).variant)))
    return rows


def _table3(cells: Cells) -> list[Step]:
    weight, loss = cells.pipeline.recipe.tuning.error_weight, cells.pipeline.recipe.tuning.loss
    # As in the paper, the loss is that of the quantized model: without L_q the loss `invisible` has nothing to hold it.
    loss = "distill" if loss == "invisible" else loss
    tuned = {**PLAIN, "tuning.enabled": True, "tuning.loss": loss, "tuning.scales": False}
    rows = [
        _step(cells, "no prefix", PLAIN, cells.empty),
        _step(cells, "+ greedy search", PLAIN, cells.found),
        *([_step(cells, AVERAGED, PLAIN)] if cells.trace and cells.trace.averaged else []),
        _step(cells, "+ prefix tuning", {**tuned, "tuning.error_weight": 0.0}),
    ]
    if weight:
        rows.append(_step(cells, "+ quantization-aware loss", {**tuned, "tuning.error_weight": weight}))
    return rows


def _remedies(cells: Cells) -> list[Step]:
    recipe = cells.pipeline.recipe
    bare = {**PLAIN, **UNROTATED, "smoothing.alpha": None}
    alpha = FALLBACK_ALPHA if recipe.smoothing.alpha is None else recipe.smoothing.alpha
    rotated = {**PLAIN, "smoothing.alpha": alpha}
    smoothed = {**rotated, **UNROTATED}
    tuned = {**rotated, "tuning.enabled": True, "tuning.scales": False}
    best = {**tuned, "tuning.scales": recipe.tuning.quantized}
    limited: list[Step] = []
    if recipe.smoothing.limit is not None:
        limited = [_step(cells, f"+ limit of {recipe.smoothing.limit:g} on channels", smoothed)]
    return [
        *(_step(cells, f"ranges: {name}", {**bare, "calibration.estimator": name}) for name in ESTIMATORS),
        _step(cells, f"+ smoothing (ranges: {recipe.calibration.estimator})", {**smoothed, "smoothing.limit": None}),
        *limited,
        *([_step(cells, "+ rotation", rotated)] if recipe.smoothing.rotates else []),
        _step(cells, "+ tuned prefix", tuned),
        *([_step(cells, "+ tuned scales", best)] if recipe.tuning.quantized else []),
        _step(cells, f"+ float Sites ({KEPT_FLOAT})", {**best, "export.keep_float": [KEPT_FLOAT]}),
    ]


def _step(cells: Cells, label: str, settings: dict[str, Any], prefix: Prefix | None = None) -> Step:
    """Measure what a recipe deploys with the searched prefix (or another), and the float model with the same prefix."""
    built = cells.built(cells.searched if prefix is None else prefix, settings)
    kind: Literal["none", "searched", "tuned"] = "none"
    if built.quantization.prefix.length:
        kind = "tuned" if built.tuning else "searched"
    return Step(
        label=label,
        settings=settings,
        prefix=kind,
        scores=cells.scores(f"static W8A8: {label}", built.variant),
        fp=cells.scores(f"FP with the prefix of: {label}", Variant(built.quantization.prefix)),
    )


def _table5(cells: Cells) -> Parts:
    without = cells.last_block(cells.empty)
    found = {"windows": without["windows"], "length": without["length"], "without": without["input"]}
    return {**found, "with": cells.last_block(cells.prefix)["input"] if cells.prefix.length else None}


def _table6(cells: Cells) -> Parts:
    found: Parts = {}
    if cells.trace:
        found |= {
            "search_seconds": cells.trace.seconds,
            "search_mode": cells.trace.mode,
            "positions_scored": cells.trace.positions_scored,
            "positions_full_scan": cells.trace.positions_full_scan,
            "candidates_scored": sum(step.exact for step in cells.trace.steps),
        }
    if cells.searched.length:
        tuning = cells.built(cells.searched, {"tuning.enabled": True}).tuning
        if tuning:
            found |= {"tuning_seconds": tuning.seconds, "tuning_steps": tuning.steps, "tuning_loss": tuning.loss}
    return found


def _figure2(cells: Cells) -> Parts:
    return {
        "without": cells.magnitudes(cells.empty),
        "with": cells.magnitudes(cells.prefix) if cells.prefix.length else [],
    }


def _figure3(cells: Cells) -> Parts:
    without = cells.attention(cells.empty)
    behind = cells.attention(cells.prefix)["layers"] if cells.prefix.length else []
    return {"tokens": without["tokens"], "without": without["layers"], "with": behind}


_MAKERS: dict[str, Callable[[Cells], Any]] = {
    "table1": _table1,
    "table3": _table3,
    "remedies": _remedies,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
    "figure2": _figure2,
    "figure3": _figure3,
}


def _scheme(variant: Variant) -> QuantScheme:
    return variant.scheme or PRECISIONS["w8a8"]


def _document(cells: Cells, found: Parts, left_out: dict[str, str]) -> Study:
    pipeline, run = cells.pipeline, cells.run
    spec = run.get(pipeline.files).spec
    return Study.model_validate(
        {
            "schema": 1,
            "tool": {"version": tool_version()},
            "created": datetime.now(timezone.utc),
            "model": {**model_row(spec), "source": _without_folders(spec.source)},
            "recipe": _without_folders(pipeline.recipe.model_dump(mode="json")),
            "calibration": run.get(pipeline.text).name,
            "prefix": _prefix_in_use(cells),
            **found,
            "left_out": left_out,
            "cells": tuple(cells.done.values()),
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cpu": platform.processor() or platform.machine(),
                "versions": installed_versions(LIBRARIES),
            },
        }
    )


def _without_folders(value: Any) -> Any:
    """Return a recipe with paths reduced to file names, because a study is meant to be shared."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).resolve().name if isinstance(value, str) and value and Path(value).exists() else value
