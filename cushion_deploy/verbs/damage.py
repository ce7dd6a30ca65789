"""Damage: how far static W8A8 is from the original model, which Sites do it, and what each remedy removes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from cushion_deploy.calib.kind_costs import KindCosts, kind_costs
from cushion_deploy.calib.smooth import ChannelMaxima, smoothing_from
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.observe import observed
from cushion_deploy.recipe import ROTATIONS, SmoothQuant
from cushion_deploy.store.json_files import finite
from cushion_deploy.verbs.trial import COSTLY, Cost, Trial

BLAMED = 128
"""Tokens of the first judged window that single kinds of Sites are measured on; every kind takes a pass."""
WORTH = 0.1
"""Share of a divergence above which a remedy is worth a warning."""


@dataclass(frozen=True)
class Step:
    """A remedy.

    Attributes:
        remedy: its name.
        cost: the cost with it and all steps before it.
        built: whether the recipe has it.
    """

    remedy: str
    cost: Cost
    built: bool = True


@dataclass(frozen=True)
class Damage:
    """What static W8A8 does to a model.

    Attributes:
        plain: the cost without a prefix and without other remedies.
        steps: remedies, each added to those before it.
        kinds: where the damage of ``plain`` is done.
    """

    plain: Cost
    steps: tuple[Step, ...]
    kinds: KindCosts

    @property
    def built(self) -> Cost:
        """The cost with the remedies of the recipe, which are the first ones."""
        return next((step.cost for step in reversed(self.steps) if step.built), self.plain)

    @property
    def removed(self) -> tuple[tuple[Step, float], ...]:
        """The divergence in nats per token that each step removes; negative for one that adds to it."""
        before = (self.plain, *(step.cost for step in self.steps))
        pairs = zip(before, self.steps, strict=False)
        return tuple((step, cost.distance - step.cost.distance) for cost, step in pairs)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "steps": [
                {"remedy": step.remedy, "built": step.built, "removed": finite(removed), **step.cost.to_json()}
                for step, removed in self.removed
            ],
            "kinds": {kind: finite(value) for kind, value in self.kinds.kinds.items()},
            "worst_sites": [{"site": site, "lost": finite(lost)} for site, lost in self.kinds.worst],
            "worst_sites_together": finite(self.kinds.together),
        }


def examine_damage(trial: Trial, prefix: Prefix, prefix_name: str) -> Damage:
    """Measure the plain scheme, its kinds of Sites, and the remedies one after the other.

    Every view of the model is observed once: the pass behind the prefix also measures channels for SmoothQuant, and the
    pass of the smoothed model also counts what rotations would make of its Sites.

    Args:
        trial: the model and its text.
        prefix: what a build would probably put before every text; empty for nothing.
        prefix_name: its name as a remedy.
    """
    model, none, maxima = trial.model, trial.model.no_prefix(), ChannelMaxima(trial.model)
    same = trial.same_as_without(prefix)
    with observed(model, maxima) if same else nullcontext():
        histograms = trial.observe(model, none)
    scales = trial.scales(histograms, model, none)
    plain = trial.cost(model, none, scales, "static W8A8 without remedies")
    kinds = kind_costs(model, none, trial.scheme, scales, trial.judged[:1, :BLAMED], trial.progress)
    steps = []
    if not same:
        with observed(model, maxima):
            histograms = trial.observe(model, prefix)
        scales = trial.scales(histograms, model, prefix)
        steps.append(Step(prefix_name, trial.cost(model, prefix, scales, f"static W8A8 with {prefix_name}")))
    return Damage(plain, (*steps, *_smoothed(trial, prefix, maxima)), kinds)


def _smoothed(trial: Trial, prefix: Prefix, maxima: ChannelMaxima) -> list[Step]:
    """Return the steps of SmoothQuant, where the recipe has it, and of rotations, whether it has them or not."""
    model, config = trial.model, trial.recipe.smoothing
    built = config.rotates
    if not built:
        usual = SmoothQuant()
        config = config.model_copy(update={name: getattr(usual, name) for name in ROTATIONS})
    both = smoothing_from(model, maxima.of_all_processes(), config)
    view = model.folded(replace(both, rotations={}))
    steps: list[Step] = []
    if not (both.factors or both.rotations):
        return steps
    plain, rotated = trial.observe_rotated(view, prefix, both.rotations)
    if both.factors:
        scales = trial.scales(plain, view, prefix)
        steps.append(Step("SmoothQuant", trial.cost(view, prefix, scales, "static W8A8 with SmoothQuant")))
    if both.rotations:
        view = model.folded(both)
        scales = trial.scales(rotated, view, prefix)
        steps.append(Step("the rotation", trial.cost(view, prefix, scales, "static W8A8 with rotations"), built))
    return steps


def damage_warnings(found: Damage) -> Iterator[str]:
    """Yield a sentence for a costly build, for a remedy that the recipe forgoes, and for one that does harm."""
    build = found.built.distance
    if found.built.costly:
        yield (
            f"static W8A8 as a build would make it still diverges by {build:.3f} nats per token from the original "
            f"model (close is {COSTLY}): try --tune or --keep-float auto:N"
        )
    for step, removed in found.removed:
        after = step.cost.distance
        if not step.built and removed > WORTH * build:
            yield (
                f"the recipe disables {step.remedy}, which would lower the divergence from {build:.3f} to {after:.3f} "
                "nats per token"
            )
        if step.built and removed < -WORTH * after:
            yield f"{step.remedy} raises the divergence by {-removed:.3f} to {after:.3f} nats per token"
