"""From a prefix to what is deployed: calibrated, Sites kept in floating point, tuned. Each stage is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_cached_scales,
    read_prefix,
    read_scales,
    read_smoothing,
    write_prefix,
    write_scales,
)
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.pipeline.calibrating import calibrate, calibrate_cache, smooth
from cushion_deploy.pipeline.files import read_json, write_json
from cushion_deploy.pipeline.limits import require_positions
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.prefix.trace import TuningTrace

SENSITIVITY_WINDOWS = (2, 256)
"""Windows of text, and tokens in each, that Sites are compared on."""


@dataclass(frozen=True)
class Deployed:
    """All that turns a model into the one that is deployed.

    Attributes:
        prefix: tuned, or as it was found.
        smoothing: folded into the weights; None for none.
        scheme: what is quantized, Sites kept in floating point named.
        scales: static activation scales behind the prefix.
        amax: Site to the largest magnitude seen in calibration.
        tuning: how the prefix was tuned; None where it was not.
        kv: scales of an INT8 cache behind the prefix; None for one in floating point.
    """

    prefix: Prefix
    smoothing: Smoothing | None
    scheme: QuantScheme
    scales: ActivationScales
    amax: Mapping[str, float]
    tuning: TuningTrace | None = None
    kv: KvScales | None = None

    @property
    def quantization(self) -> Quantization:
        """The parts that decide how the model runs."""
        return Quantization(self.prefix, self.scheme, self.scales, self.smoothing, self.kv)


def prepare(ws: Workspace, prefix: Prefix, *, tuned: bool = True) -> Deployed:
    """Return what is deployed behind a prefix: the recipe's smoothing, scales, float Sites and tuning.

    Args:
        ws: the run.
        prefix: as the search found it.
        tuned: False leaves the tuning out whatever the recipe says.

    Raises:
        UsageError: the prefix belongs to another model.
    """
    if prefix.model_digest != ws.source.digest:
        raise UsageError("the prefix was made for another model", hint="run `cushion-deploy search` for this model")
    smoothing = smooth(ws, prefix)
    scales, amax = calibrate(ws, prefix, smoothing)
    scheme = keep_float(ws, Deployed(prefix, smoothing, ws.scheme, scales, amax))
    deployed = Deployed(prefix, smoothing, scheme, scales, amax)
    if tuned and ws.recipe.tuning.enabled and prefix.length:
        deployed = tune(ws, deployed)
        if not ws.recipe.tuning.scales:
            scales, amax = calibrate(ws, deployed.prefix, smoothing)
            deployed = replace(deployed, scales=scales, amax=amax)
    return replace(deployed, kv=calibrate_cache(ws, deployed.prefix, smoothing))


def read_deployed(ws: Workspace, bundle: Path, graph: ExportedGraph) -> Deployed:
    """Return what a bundle deploys, from its files; a Site that has a scale but no Q node was kept in float.

    Raises:
        UsageError: a file is missing.
        UntrustedArtifact: a file is damaged, or the smoothing is another than the scales were calibrated under.
    """
    scales = read_scales(bundle / SCALES_FILE)
    smoothing = read_smoothing(bundle / SMOOTHING_FILE) if scales.lineage.smoothing else None
    if smoothing and smoothing.digest != scales.lineage.smoothing:
        raise UntrustedArtifact(
            f"the scales in {bundle} were calibrated under another smoothing than lies beside them",
            hint="build the bundle again",
        )
    kept = [s for s in scales.scales if s not in graph.sites and (s != HEAD_SITE or ws.scheme.quantize_head)]
    scheme = replace(ws.scheme, float_sites=tuple(kept))
    prefix, kv = read_prefix(bundle / PREFIX_FILE), read_cached_scales(graph)
    return Deployed(prefix, smoothing, scheme, scales, {}, kv=kv)


def require_model_of(ws: Workspace, bundle: Path) -> None:
    """Check that the model at hand is the one that a bundle was built from; raises UsageError otherwise."""
    try:
        digest = ws.source.digest
    except UsageError as e:
        raise UsageError(
            f"the model that the bundle was built from is not at hand: {e.message}", hint="give it with --model"
        ) from e
    if digest != read_scales(bundle / SCALES_FILE).lineage.model:
        raise UsageError(
            f"{ws.source.label} is not the model that the bundle was built from", hint="give the original with --model"
        )


def keep_float(ws: Workspace, deployed: Deployed) -> QuantScheme:
    """Return the scheme with the Sites that the recipe keeps in floating point, named or found by their cost."""
    from cushion_deploy.families import get_family

    scheme, wishes = deployed.scheme, ws.recipe.export.keep_float
    if not wishes:
        return scheme
    known = list(get_family(ws.model.spec.family).linears(ws.model.spec, head=scheme.quantize_head))
    named = [Site(wish) for wish in wishes if not wish.startswith("auto:")]
    unknown = [site for site in named if site not in known]
    if unknown:
        raise UsageError(
            f"export.keep_float names '{unknown[0]}', which is no quantized Site of this model",
            hint=f"Sites are called {known[0]} to {known[-1]}; or give auto:N",
        )
    count = sum(_automatic(wish) for wish in wishes if wish.startswith("auto:"))
    if count:
        costs = site_costs(ws, deployed)
        left = [site for site in sorted(costs, key=lambda s: -costs[s]) if site not in named]
        named += left[:count]
    chosen = set(named)
    return replace(scheme, float_sites=tuple(site for site in known if site in chosen))


def site_costs(ws: Workspace, deployed: Deployed) -> dict[Site, float]:
    """Return what each quantized Site costs alone, in nats a token on calibration text."""
    scales = deployed.scales
    parents = {"scales": scales.digest, "prefix": deployed.prefix.digest, "scheme": deployed.scheme.digest}

    def make(out: Path) -> None:
        from cushion_deploy.calib.sensitivity import site_costs as measure

        count, window = SENSITIVITY_WINDOWS
        windows = text_windows(ws, count, min(window, ws.model.spec.max_positions - deployed.prefix.length))
        found = measure(ws.model, deployed.quantization, windows, ws.progress)
        write_json(out / "costs.json", found)

    found: dict[Site, float] = read_json(ws.stage("sensitivity", parents, make) / "costs.json")
    return found


def tune(ws: Workspace, deployed: Deployed) -> Deployed:
    """Return what is deployed with a tuned prefix, and scales if the recipe trains them too."""
    config = ws.recipe.tuning
    parents = {
        "scales": deployed.scales.digest,
        "prefix": deployed.prefix.digest,
        "scheme": deployed.scheme.digest,
        "corpus": ws.corpus(ws.recipe.calibration.data, "calibration").digest,
        "seed": ws.recipe.seed,
        "tuning": config.model_dump(mode="json"),
    }

    def make(out: Path) -> None:
        from cushion_deploy.prefix.tune import PrefixTuning

        require_positions(ws.recipe, ws.model.spec, deployed.prefix.length, ("tuning",))
        windows = text_windows(ws, config.windows + config.held_out, config.window)
        # Spread over the text like the others, so that the judge hears of all of it.
        judged = np.zeros(len(windows), dtype=bool)
        judged[np.linspace(0, len(windows) - 1, min(config.held_out, len(windows) // 2)).astype(int)] = True
        if judged.sum() == 0:
            raise UsageError(
                f"the calibration text has one window of {config.window} tokens, and tuning needs two at least",
                hint="give more text, or a smaller window (tuning.window)",
            )
        tuning = PrefixTuning(
            ws.model,
            deployed.quantization,
            windows[~judged],
            windows[judged],
            config,
            ws.recipe.seed,
            ws.store.scratch("tune", ws.key("tune", parents)),
            ws.progress,
        )
        prefix, scales, trace = tuning.run()
        write_prefix(prefix, out / PREFIX_FILE)
        write_scales(scales, out / SCALES_FILE)
        write_json(out / "trace.json", trace.to_json())

    folder = ws.stage("tune", parents, make)
    return replace(
        deployed,
        prefix=read_prefix(folder / PREFIX_FILE),
        scales=read_scales(folder / SCALES_FILE),
        tuning=TuningTrace.from_json(read_json(folder / "trace.json")),
    )


def text_windows(ws: Workspace, count: int, window: int) -> IntArray:
    """Return up to ``count`` full windows int64 ``[count, window]``, spread evenly over the calibration text."""
    from cushion_deploy.evaluate.perplexity import cut_windows

    corpus = ws.corpus(ws.recipe.calibration.data, "calibration")
    ids = ws.model.encode(corpus.text)
    windows = cut_windows(ids, window, len(ids), corpus.name)
    chosen: IntArray = windows[np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))]
    return chosen


def _automatic(wish: str) -> int:
    number = wish.partition(":")[2]
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"export.keep_float holds '{wish}'", hint="write auto:N with N of 1 or more, such as auto:4")
    return int(number)
