"""Look at a model before an hour is spent on it: its sinks, what static INT8 costs it, what a build needs here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.engines.registry import Availability, availabilities
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import TextScore, score_text
from cushion_deploy.modeling.magnitudes import layer_magnitudes
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.pipeline.limits import longest_prefix
from cushion_deploy.pipeline.needs import GIB, Needs, estimate_needs
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.prefix.candidates import obvious_tokens
from cushion_deploy.prefix.objective import score_candidates, score_prefix
from cushion_deploy.prefix.search import draw_text

SINK_RATIO = 20.0
"""A token is a sink where it enters a Site at this many times what the median token does."""
SAMPLES, SAMPLE_TOKENS = 4, 256
HALF_RESIDUAL = 30_000


@dataclass(frozen=True)
class Sink:
    """A token that carries a massive activation.

    Attributes:
        position: in its window.
        token: its text.
        share: of the windows looked at that have a sink at this position.
        site: where it is largest, of all Sites.
        magnitude: there.
        times_median: the magnitude over that of the median token at the same Site.
    """

    position: int
    token: str
    share: float
    site: Site
    magnitude: float
    times_median: float


@dataclass(frozen=True)
class Cost:
    """Perplexity on a sample of text, in floating point and in static W8A8 without a prefix."""

    tokens: int
    fp: float
    quantized: float

    @property
    def change(self) -> float:
        """Growth of the perplexity, as a share."""
        return self.quantized / self.fp - 1


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        model: what it is.
        sinks: one for each position that has any, the largest first.
        sites: Sites that a sink enters, with how many times the median it is there, the largest first.
        relief: share of the quantization error that the best of some common tokens leaves as a prefix.
        prefix_pays: whether that is worth a prefix by the recipe's tau.
        prefix_allowed: whether the recipe lets a build have one.
        largest_residual: largest magnitude between two layers, without a prefix.
        cost: of static W8A8 without a prefix.
        needs: of a build.
        engines: every engine.
        warnings: sentences.
    """

    model: dict[str, Any]
    sinks: tuple[Sink, ...]
    sites: tuple[tuple[Site, float], ...]
    relief: float
    prefix_pays: bool
    prefix_allowed: bool
    largest_residual: float
    cost: Cost
    needs: Needs
    engines: tuple[Availability, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        cost = {**asdict(self.cost), "change": self.cost.change}
        return {
            **asdict(self),
            "cost": {name: value if math.isfinite(value) else None for name, value in cost.items()},
            "needs": {**asdict(self.needs), "total_seconds": self.needs.total_seconds},
        }


def diagnose(ws: Workspace) -> Diagnosis:
    """Look at the recipe's model on a sample of its calibration text.

    Raises:
        UsageError: the text is shorter than the sample, or the model cannot be loaded.
    """
    model, config = ws.model, ws.recipe.search
    data = ws.recipe.calibration.data
    # Without the half that a build samples from the model: that takes longer than the whole look.
    chosen = python_topics("calibration") if data is None else ws.corpus(data, "calibration")
    corpus = model.encode(chosen.text)
    windows = _sample(model, corpus)
    sinks, sites = find_sinks(model, windows)
    text = draw_text(corpus, min(config.text_tokens, windows.shape[1]), ws.recipe.seed, 0)
    before = score_prefix(model, [], text, config.objective)
    scores = score_candidates(model, [], text, obvious_tokens(model), config.objective, progress=ws.progress)
    relief = min(scores, default=before) / before if before else 1.0
    cost = static_cost(ws, windows)
    needs = estimate_needs(ws, windows)
    spec = model.spec
    facts = {
        "source": spec.source,
        "family": spec.family,
        "parameters": spec.parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "positions": spec.max_positions,
        "linears": sum(map(len, model.sites.values())),
    }
    residual = max(layer["top1"] for layer in layer_magnitudes(model, Prefix.empty(spec), windows[:1]))
    found = Diagnosis(
        facts,
        sinks,
        sites,
        relief,
        prefix_pays=relief <= config.tau,
        prefix_allowed=longest_prefix(ws.recipe) > 0,
        largest_residual=residual,
        cost=cost,
        needs=needs,
        engines=availabilities(),
    )
    return replace(found, warnings=tuple(_warnings(ws, found)))


@torch.inference_mode()
def find_sinks(model: TorchRunner, windows: IntArray) -> tuple[tuple[Sink, ...], tuple[tuple[Site, float], ...]]:
    """Return the sinks of windows int64 ``[count, length]``, and the Sites that they enter with their ratios."""
    largest: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        if site != HEAD_SITE:
            largest[site] = x.abs().amax(dim=-1)

    with observed(model, keep):
        model.run(model.tensor(windows), [], head=False)
    sites = list(largest)
    sizes = torch.stack([largest[site] for site in sites])  # [Sites, windows, length]
    usual = sizes.flatten(1).median(dim=1).values.clamp(min=torch.finfo(torch.float32).tiny)
    ratios = sizes / usual[:, None, None]
    strongest, where = ratios.max(dim=0)  # [windows, length]
    sinks = []
    for position in torch.nonzero((strongest >= SINK_RATIO).any(dim=0)).flatten().tolist():
        row = int(strongest[:, position].argmax())
        site = int(where[row, position])
        sinks.append(
            Sink(
                position,
                model.token_text(int(windows[row, position])),
                float((strongest[:, position] >= SINK_RATIO).float().mean()),
                sites[site],
                float(sizes[site, row, position]),
                float(strongest[row, position]),
            )
        )
    by_site = {site: float(r) for site, r in zip(sites, ratios.flatten(1).amax(dim=1), strict=True) if r >= SINK_RATIO}
    order = sorted(sinks, key=lambda sink: -sink.times_median)
    return tuple(order), tuple(sorted(by_site.items(), key=lambda entry: -entry[1]))


@torch.inference_mode()
def static_cost(ws: Workspace, windows: IntArray) -> Cost:
    """Return the perplexity of one half of the windows, quantized with the ranges of the other, without any remedy."""
    model, config = ws.model, ws.recipe.calibration
    half = len(windows) // 2
    empty = Prefix.empty(model.spec)
    histograms = observe_sites(model, empty, windows[:half], np.ones_like(windows[:half]), progress=ws.progress)
    scales = choose_scales(
        histograms,
        RangeEstimator(config.estimator, config.percentile),
        model.lineage(empty),
        windows[:half].size,
    )

    def nll(ids: IntArray) -> FloatArray:
        return model.token_nll(ids, empty)

    plain = score_text(nll, windows[half:], ws.progress, "perplexity in floating point")
    with simulated(model, PRECISIONS["w8a8"], scales):
        quantized = score_text(nll, windows[half:], ws.progress, "perplexity in static W8A8")
    return Cost(plain.tokens, TextScore(plain.losses).perplexity, quantized.perplexity)


def _sample(model: TorchRunner, corpus: IntArray) -> IntArray:
    """Return windows int64 ``[count, length]`` spread over a text."""
    length = min(SAMPLE_TOKENS, model.spec.max_positions, len(corpus) // 2)
    count = min(SAMPLES, len(corpus) // length) if length >= 2 else 0
    if count < 2:
        raise UsageError(f"the text holds {len(corpus)} tokens, too few to look at", hint="give more text")
    pieces = corpus[: len(corpus) // length * length].reshape(-1, length)
    chosen = pieces[np.linspace(0, len(pieces) - 1, count).astype(int)]
    before = np.tile(np.array(model.bare_tokens, dtype=np.int64), (count, 1))
    return np.concatenate([before, chosen], axis=1)[:, : model.spec.max_positions]


def _warnings(ws: Workspace, found: Diagnosis) -> list[str]:
    spec, needs, said = ws.model.spec, found.needs, []
    if needs.memory_free and needs.memory > needs.memory_free:
        said.append(
            f"a build needs about {needs.memory / GIB:.1f} GiB of memory and {needs.memory_free / GIB:.1f} are free"
        )
    if needs.disk > needs.disk_free:
        said.append(f"a build needs about {needs.disk / GIB:.1f} GiB of disk and {needs.disk_free / GIB:.1f} are free")
    if not any(engine.compiles for engine in found.engines):
        said.append("no engine can compile here")
    if found.prefix_pays and found.sinks and all(sink.position for sink in found.sinks):
        said.append("sinks stand inside of texts only, not at their beginning: look at the report before you deploy")
    if found.prefix_pays and not found.prefix_allowed:
        said.append("a prefix pays, and the recipe builds without one")
    windows = [window for window in spec.windows if window]
    if windows and found.prefix_allowed:
        said.append(
            f"{len(windows)} of {spec.num_layers} layers look back {min(windows):,} tokens: further into a text they "
            "no longer see the prefix, and sinks may come back there"
        )
    if spec.rotary and spec.rotary.rule == "longrope":
        said.append(f"a context ends at {spec.max_positions:,} positions: beyond them longrope turns cached keys anew")
    if found.largest_residual > HALF_RESIDUAL:
        said.append(
            f"the residual stream reaches {found.largest_residual:,.0f} without a prefix, and half ends at 65,504: if "
            "a prefix does not lower it, compile plans with --dtype bf16"
        )
    if not found.prefix_pays and not found.sinks and found.cost.change > 0.1:
        said.append(
            "static W8A8 is costly although no sink is to blame: SmoothQuant and --keep-float auto:N are there for that"
        )
    if spec.score_cap or spec.logit_cap:
        said.append("soft caps keep TensorRT from fusing attention into one kernel")
    if ws.model.family.positions == "alibi":
        said.append("ALiBi keeps TensorRT from fusing attention into one kernel")
    if not getattr(ws.model.tokenizer, "chat_template", None):
        said.append("the tokenizer has no chat template: `generate --chat` will not work")
    return said
