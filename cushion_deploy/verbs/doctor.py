"""Doctor: examine a model before a build: its sinks, the cost of static INT8, the resources that a build needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.registry import Availability, availabilities, choose_engines
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.magnitudes import layer_magnitudes
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sinks import Sink, find_sinks
from cushion_deploy.prefix.average import SLACK, averaged_sink, first_tokens
from cushion_deploy.prefix.candidates import obvious_tokens
from cushion_deploy.prefix.objective import score_candidates, score_prefix
from cushion_deploy.prefix.search import draw_text
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.compile import compile_options
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.resources import GIB, Resources, estimate
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.windows import default_window, longest_prefix
from cushion_deploy.verbs.damage import Damage, damage_warnings, examine_damage
from cushion_deploy.verbs.speed_probe import SpeedProbe
from cushion_deploy.verbs.trial import EVERY, Trial

SAMPLES, SAMPLE_TOKENS, EXAMINED = 9, 256, 4
"""Windows that static INT8 is tried on, tokens in each, and windows that sinks are looked for in."""
RELIEF_TOKENS = 96
"""Tokens of text that common tokens are tried before."""
HALF_RESIDUAL = 30_000


@dataclass(frozen=True)
class Diagnosis:
    """Findings about a model.

    Attributes:
        model: description of the model, JSON-ready.
        sinks: the largest sink of each position that has any, the largest first.
        sites: Sites whose input contains a sink, with its ratio to the median, the largest first.
        relief: share of the quantization error that remains with the best of some common tokens as a prefix.
        prefix_pays: whether this improvement justifies a prefix by the recipe's ``tau``.
        prefix_allowed: whether the recipe enables a prefix.
        largest_residual: largest magnitude in the residual stream between layers, without a prefix.
        likely_prefix: the text of the prefix tokens that a build would probably add: a common token, if one pays.
        damage: what static W8A8 does to the model without remedies, with each of them, and as a build would make it.
        resources: resources that a build needs on this machine.
        engines: availability of every engine.
        warnings: one sentence each.
    """

    model: dict[str, Any]
    sinks: tuple[Sink, ...]
    sites: tuple[tuple[Site, float], ...]
    relief: float
    prefix_pays: bool
    prefix_allowed: bool
    likely_prefix: tuple[str, ...]
    largest_residual: float
    damage: Damage
    resources: Resources
    engines: tuple[Availability, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        found = {
            **asdict(self),
            "cost": self.damage.plain.to_json(),
            "default_cost": self.damage.built.to_json(),
            "damage": self.damage.to_json(),
            "needs": {**asdict(self.resources), "total_seconds": self.resources.total_seconds},
        }
        del found["resources"]
        return found


def diagnose(pipeline: Pipeline, run: Run) -> Diagnosis:
    """Examine a recipe's model on a sample of its calibration text.

    Raises:
        UsageError: the text is shorter than the sample, or the model cannot be loaded.
    """
    recipe, model = pipeline.recipe, run.get(pipeline.model)
    # The half of the text that a build samples from the model is omitted: sampling takes longer than the diagnosis.
    chosen = run.get(pipeline.text) if recipe.calibration.data is not None else python_topics("calibration")
    corpus = model.encode(chosen.text)
    windows = _sample(model, corpus)
    # Sinks are looked for behind what always precedes a text, which may be one itself.
    examined = windows[:: max(1, len(windows) // EXAMINED)][:EXAMINED]
    before = np.tile(np.array(model.bare_tokens, dtype=np.int64), (len(examined), 1))
    whole = np.concatenate([before, examined], axis=1)
    sinks, sites = find_sinks(model, whole)
    token, relief = best_common_token(model, corpus, windows.shape[1], recipe, run.progress)
    pays, allowed = relief <= recipe.search.tau, longest_prefix(recipe) > 0
    # A search starts from what a family needs before every text, and without a sink it ends there.
    likely = model.bare_tokens or ((token,) if pays and allowed else ())
    names = tuple(model.token_text(each) for each in likely)
    trial = Trial(model, windows, recipe, run.progress)
    found = Diagnosis(
        _facts(model),
        sinks,
        sites,
        relief,
        prefix_pays=pays,
        prefix_allowed=allowed,
        likely_prefix=names,
        largest_residual=_largest_residual(model, whole),
        damage=examine_damage(trial, averaged_prefix(model, likely, corpus, recipe), f"the prefix {''.join(names)!r}"),
        resources=estimate_build(pipeline, run, windows),
        engines=availabilities(),
    )
    return replace(found, warnings=tuple(_warnings(model, recipe, found)))


def _facts(model: TorchRunner) -> dict[str, Any]:
    spec = model.spec
    return {
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


def _largest_residual(model: TorchRunner, windows: IntArray) -> float:
    return max(layer["top1"] for layer in layer_magnitudes(model, Prefix.empty(model.spec), windows[:1]))


def best_common_token(
    model: TorchRunner, corpus: IntArray, tokens: int, recipe: Recipe, progress: Progress
) -> tuple[int, float]:
    """Return the best of some common tokens as a prefix, and the share of the quantization error that remains with it.

    Args:
        model: the model.
        corpus: token ids, int64 ``[n]``, from which the text is drawn.
        tokens: maximum length of the text.
        recipe: its section ``search`` defines the measured error.
        progress: receives progress.
    """
    config, candidates = recipe.search, obvious_tokens(model)
    text = draw_text(corpus, min(config.text_tokens, tokens, RELIEF_TOKENS), recipe.seed, 0)
    before = score_prefix(model, KeysValues(), text, config.objective, bits=config.bits)
    scores = score_candidates(
        model, KeysValues(), text, candidates, config.objective, bits=config.bits, progress=progress
    )
    best = min(range(len(scores)), key=scores.__getitem__)
    return candidates[best], scores[best] / before if before else 1.0


def averaged_prefix(model: TorchRunner, tokens: tuple[int, ...], corpus: IntArray, recipe: Recipe) -> Prefix:
    """Return the prefix of some tokens, its first position averaged unless that costs too much of the error.

    A search compares on more text, and also demands that the unquantized model is closer to itself.
    """
    found, config = model.compute_prefix(tokens), recipe.search
    if not found.length or model.bare_tokens or config.seed_tokens or not config.average_tokens:
        return found
    averaged = averaged_sink(model, found, first_tokens(model, corpus, config, recipe.seed))
    text = draw_text(corpus, min(config.text_tokens, RELIEF_TOKENS, len(corpus)), recipe.seed, 0)
    errors = [
        score_prefix(model, model.past(each), text, config.objective, bits=config.bits) for each in (found, averaged)
    ]
    return averaged if errors[1] <= SLACK * errors[0] else found


def estimate_build(pipeline: Pipeline, run: Run, windows: IntArray) -> Resources:
    """Return the resources of a build with the recipe's engines, of those that can compile on this machine."""
    model = run.get(pipeline.model)
    speed = SpeedProbe(model, windows, pipeline.recipe).speed()
    wanted = pipeline.recipe.engines
    compiling = [engine.name for engine in availabilities() if engine.compiles and engine.name in (wanted or ())]
    engines = tuple(compiling if wanted is not None else (engine.name for engine in choose_engines(None)))
    end = pipeline.build(engines, compile_options(pipeline.recipe, ()), Path("bundle"))
    found = estimate([end], pipeline.recipe, speed, run.store.root)
    load = sum(taken.seconds for taken in run.times if taken.stage == pipeline.model.label)
    return replace(found, seconds={pipeline.model.label: load, **found.seconds})


def _sample(model: TorchRunner, corpus: IntArray) -> IntArray:
    """Return windows, int64 ``[count, length]``, spread over a text."""
    room = model.spec.max_positions - max(1, len(model.bare_tokens))
    length = min(SAMPLE_TOKENS, room, len(corpus) // EVERY)
    count = min(SAMPLES, len(corpus) // length) if length >= 2 else 0
    if count < EVERY:
        raise UsageError(f"the text has {len(corpus)} tokens, too few to examine", hint="give more text")
    pieces = corpus[: len(corpus) // length * length].reshape(-1, length)
    chosen: IntArray = pieces[np.linspace(0, len(pieces) - 1, count).astype(int)]
    return chosen


def _warnings(model: TorchRunner, recipe: Recipe, found: Diagnosis) -> list[str]:
    """Return one sentence for everything that will not work, or not work well."""
    spec = model.spec
    problems = {
        "no engine can compile on this machine": not any(engine.compiles for engine in found.engines),
        "a prefix pays, but the recipe disables it": found.prefix_pays and not found.prefix_allowed,
        "sinks occur only inside texts, not at their beginning: check the report before you deploy": (
            found.prefix_pays and bool(found.sinks) and all(sink.position for sink in found.sinks)
        ),
        "soft caps prevent TensorRT from fusing attention into one kernel": bool(spec.score_cap or spec.logit_cap),
        "ALiBi prevents TensorRT from fusing attention into one kernel": model.family.positions == "alibi",
        "the tokenizer has no chat template: `generate --chat` will not work": (
            not getattr(model.tokenizer, "chat_template", None)
        ),
    }
    sentences = [sentence for sentence, holds in problems.items() if holds]
    return [
        *_resource_warnings(found.resources),
        *_position_warnings(spec, recipe, found),
        *damage_warnings(found.damage),
        *sentences,
    ]


def _resource_warnings(needed: Resources) -> Iterator[str]:
    for what, amount, free in (
        ("memory", needed.memory, needed.memory_free),
        ("disk", needed.disk, needed.disk_free),
    ):
        if amount > free:
            yield f"a build needs about {amount / GIB:.1f} GiB of {what} but only {free / GIB:.1f} GiB are free"


def _position_warnings(spec: ModelSpec, recipe: Recipe, found: Diagnosis) -> Iterator[str]:
    tokens, back = recipe.calibration.window or default_window(spec), spec.smallest_window
    if tokens <= back:
        yield (
            f"{sum(map(bool, spec.windows))} of {spec.num_layers} layers look back {back:,} tokens, and calibration "
            f"reads texts of {tokens:,}: set calibration.window higher, to observe what happens beyond"
        )
    if spec.rotary and spec.rotary.rule == "longrope":
        yield f"the context ends at {spec.max_positions:,} positions, where longrope would switch its factors"
    if found.largest_residual > HALF_RESIDUAL:
        yield (
            f"the residual stream reaches {found.largest_residual:,.0f} without a prefix, and the largest float16 "
            "value is 65,504: if a prefix does not lower it, plans are compiled in bfloat16"
        )
