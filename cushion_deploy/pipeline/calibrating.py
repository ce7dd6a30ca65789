"""What is measured on calibration text behind a prefix: smoothing, scales, scales of an INT8 cache. Each is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_kv_scales,
    read_scales,
    read_smoothing,
    write_kv_scales,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.pipeline.files import read_json, write_json
from cushion_deploy.pipeline.limits import require_positions
from cushion_deploy.pipeline.workspace import Workspace


def smooth(ws: Workspace, prefix: Prefix) -> Smoothing | None:
    """Return the smoothing measured on the calibration text behind a prefix; None where the recipe wants none."""
    alpha = ws.recipe.smoothing.alpha
    if alpha is None:
        return None
    limit = ws.recipe.smoothing.limit
    parents = {**calibration_parents(ws, prefix), "alpha": alpha, "limit": limit}

    def make(out: Path) -> None:
        from cushion_deploy.calib.smooth import channel_maxima, choose_factors

        ids, mask = calibration_windows(ws, prefix)
        maxima = channel_maxima(ws.model, prefix, ids, mask, progress=ws.progress)
        write_smoothing(choose_factors(ws.model, maxima, alpha, limit), out / SMOOTHING_FILE)

    return read_smoothing(ws.stage(_stage("smooth", prefix), parents, make) / SMOOTHING_FILE)


def calibrate(ws: Workspace, prefix: Prefix, smoothing: Smoothing | None) -> tuple[ActivationScales, dict[str, float]]:
    """Return static activation scales behind a prefix, and the largest magnitude at each Site."""
    config = ws.recipe.calibration
    parents = {**calibration_parents(ws, prefix), "smoothing": smoothing.digest if smoothing else ""}

    def make(out: Path) -> None:
        from cushion_deploy.calib.calibrate import choose_scales, observe_sites
        from cushion_deploy.calib.estimators import RangeEstimator

        ids, mask = calibration_windows(ws, prefix)
        model = ws.folded(smoothing)
        histograms = observe_sites(model, prefix, ids, mask, progress=ws.progress)
        scales = choose_scales(
            histograms,
            RangeEstimator(config.estimator, config.percentile),
            model.lineage(prefix, ws.corpus(config.data, "calibration").digest),
            int(mask.sum()),
        )
        write_scales(scales, out / SCALES_FILE)
        write_json(out / "amax.json", {site: h.amax for site, h in histograms.items()})

    folder = ws.stage(_stage("calibrate", prefix), parents, make)
    return read_scales(folder / SCALES_FILE), read_json(folder / "amax.json")


def calibrate_cache(ws: Workspace, prefix: Prefix, smoothing: Smoothing | None) -> KvScales | None:
    """Return the scales of an INT8 cache behind a prefix; None where the recipe keeps it in floating point."""
    config, export = ws.recipe.calibration, ws.recipe.export
    if export.kv_cache == "float":
        return None
    with_prefix = export.prefix == "cache" and prefix.length > 0
    parents = {
        **calibration_parents(ws, prefix),
        "smoothing": smoothing.digest if smoothing else "",
        "granularity": export.kv_scales,
        "with prefix": with_prefix,
    }

    def make(out: Path) -> None:
        from cushion_deploy.calib.estimators import RangeEstimator
        from cushion_deploy.calib.kv_cache import choose_kv_scales, observe_cache

        ids, mask = calibration_windows(ws, prefix)
        model = ws.folded(smoothing)
        scales = choose_kv_scales(
            observe_cache(model, prefix, ids, mask, export.kv_scales, progress=ws.progress),
            RangeEstimator(config.estimator, config.percentile),
            export.kv_scales,
            prefix,
            model.lineage(prefix, ws.corpus(config.data, "calibration").digest),
            int(mask.sum()),
            with_prefix=with_prefix,
        )
        write_kv_scales(scales, out / KV_SCALES_FILE)

    return read_kv_scales(ws.stage(_stage("calibrate-kv", prefix), parents, make) / KV_SCALES_FILE)


def calibration_parents(ws: Workspace, prefix: Prefix) -> dict[str, Any]:
    """Return what decides anything that is measured on the calibration text behind a prefix."""
    return {
        "model": ws.source.digest,
        "prefix": prefix.digest,
        "corpus": ws.corpus(ws.recipe.calibration.data, "calibration").digest,
        "calibration": ws.recipe.calibration.model_dump(mode="json", exclude={"data"}),
    }


def calibration_windows(ws: Workspace, prefix: Prefix) -> tuple[IntArray, IntArray]:
    """Return ids and mask of the calibration text, int64 ``[windows, window]``; documents stay apart."""
    from cushion_deploy.calib.corpora import pack_windows

    config = ws.recipe.calibration
    require_positions(ws.recipe, ws.model.spec, prefix.length, ("calibration",))
    corpus = ws.corpus(config.data, "calibration")
    documents = [ws.model.encode(text) for text in corpus.documents]
    return pack_windows(documents, config.window, config.windows, corpus.name)


def _stage(name: str, prefix: Prefix) -> str:
    return name if prefix.length else f"{name}-without-prefix"
