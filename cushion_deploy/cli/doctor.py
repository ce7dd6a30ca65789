"""`doctor`: examine a model before building it, or without a model, this installation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cushion_deploy.cli.environment import environment_lines
from cushion_deploy.cli.evaluation_options import TEXTS
from cushion_deploy.cli.help import FILE, option, verb
from cushion_deploy.cli.options import (
    compute_options,
    make_run,
    parse_settings,
    revision_option,
    run_options,
    set_option,
)
from cushion_deploy.cli.progress import progress
from cushion_deploy.dependencies import COMPUTE, require_versions
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.render.formatting import count, duration, percent, perplexity, plural, size

SHOWN = 5
"""Number of sinks and Sites to print."""

if TYPE_CHECKING:
    from cushion_deploy.verbs.damage import Damage
    from cushion_deploy.verbs.doctor import Diagnosis


@verb("doctor", "doctor", "doctor model.gguf", "doctor org/name --calib-data chats.jsonl")
@click.argument("model", metavar="[MODEL]", required=False)
@revision_option
@option("--recipe", "file", heading="Recipe", type=FILE, metavar="FILE", help="YAML file with settings.")
@set_option
@option(
    "--calib-data",
    heading="Calibration",
    metavar="DATA",
    fallback="from the recipe, as in `build`",
    help=f"Text to examine the model on: {TEXTS}; self is text sampled from the model.",
)
@compute_options
@run_options
def command(
    model: str | None,
    revision: str | None,
    file: Path | None,
    settings: tuple[str, ...],
    calib_data: str | None,
    device: str | None,
    compute_dtype: str | None,
    work_dir: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check this installation; with MODEL, what static INT8 would cost that model.

    Without MODEL: which libraries, engines and GPUs are there, what is missing, and the command that installs it.

    With MODEL (GGUF file, Hugging Face folder, or hub id): whether it has attention sinks, how much accuracy static
    INT8 costs without and with each remedy, and how much time, memory and disk a build needs here. Takes one to two
    minutes for a small model.
    """
    if model is None:
        _refuse_without_model(
            revision=revision, recipe=file, set=settings, calib_data=calib_data, device=device, dtype=compute_dtype
        )
        from cushion_deploy.verbs.environment import examine_environment

        here = examine_environment()
        click.echo(json.dumps(here.to_json()) if as_json else "\n".join(environment_lines(here)))
        return
    require_versions(*COMPUTE)
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.verbs.doctor import diagnose

    recipe = Recipe.load(file) if file else Recipe()
    given: dict[str, object] = {
        "model": model,
        "revision": revision,
        "calibration.data": calib_data,
        "compute.device": device,
        "compute.dtype": compute_dtype,
    }
    overrides = {name: value for name, value in given.items() if value is not None} | parse_settings(settings)
    with progress(quiet) as report:
        run = make_run(work_dir, report)
        pipeline = Pipeline.of(recipe.merged(overrides))
        with run.lock():
            found = diagnose(pipeline, run)
    click.echo(json.dumps(found.to_json()) if as_json else "\n".join(_lines(found)))


def _refuse_without_model(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{name.replace('_', '-')} was given without MODEL",
                hint="give a model to examine, or leave the option out to examine this installation",
            )


def _lines(found: Diagnosis) -> list[str]:
    m = found.model
    lines = [
        f"{m['source']}: {m['family']}, {count(m['parameters'])} parameters, {m['layers']} layers, "
        f"{m['linears']} linears, {m['positions']:,} positions",
        "",
        _sink_sentence(found),
    ]
    for sink in found.sinks[:SHOWN]:
        lines.append(
            f"  position {sink.position} ({sink.token!r}, in {100 * sink.share:.0f} % of the texts): "
            f"{sink.magnitude:,.0f} at {sink.site}, {sink.times_median:,.0f} times the median token"
        )
    if len(found.sinks) > SHOWN:
        lines.append(f"  and at {len(found.sinks) - SHOWN} more positions")
    if found.sites:
        shown = ", ".join(f"{site} ({ratio:,.0f} x)" for site, ratio in found.sites[:SHOWN])
        lines.append(
            f"  Sites: {shown}" + (f" and {len(found.sites) - SHOWN} more" if len(found.sites) > SHOWN else "")
        )
    lines.append(_prefix_sentence(found))
    lines += ["", *_damage_lines(found.damage), ""]
    needed = found.resources
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in needed.seconds.items())
    lines += [
        f"a build takes about {duration(needed.total_seconds)} here ({parts}; a GGUF file is already converted)",
        f"memory about {size(needed.memory)} ({size(needed.memory_free)} free), "
        f"disk about {size(needed.disk)} ({size(needed.disk_free)} free)",
        "",
    ]
    for engine in found.engines:
        version = f" {engine.version}" if engine.version else ""
        gpus = f"; GPUs: {', '.join(engine.gpus)}" if engine.gpus else ""
        lines.append(f"{engine.name}{version}: {engine.note}{gpus}")
    lines += [f"warning: {text}" for text in found.warnings]
    return lines


def _damage_lines(found: Damage) -> list[str]:
    plain, kinds = found.plain, found.kinds
    rows = [("without remedies", plain, True), *((f"+ {step.remedy}", step.cost, step.built) for step in found.steps)]
    last = max(number for number, (_, _, built) in enumerate(rows) if built)
    lines = [
        f"static W8A8, roughly ({plain.tokens:,} tokens; KL: divergence from the original model in nats per token):",
        f"  {'':38}perplexity             KL  from position 16",
        f"  {'original':38}{perplexity(plain.fp):>10}",
    ]
    for number, (name, cost, built) in enumerate(rows):
        note = " (as a build makes it)" if number == last else "" if built else " (disabled)"
        lines.append(
            f"  {name + note:38}{perplexity(cost.quantized):>10} {percent(cost.change):>8} {cost.divergence:>7.3f} "
            f"{cost.later:>17.3f}"
        )
    by_kind = ", ".join(f"{kind} {value:.3f}" for kind, value in kinds.kinds.items())
    lines.append(f"KL with only one kind of Sites quantized: {by_kind}")
    if kinds.worst:
        worst = ", ".join(f"{site} ({100 * lost:.0f} %)" for site, lost in kinds.worst)
        lines += [
            f"  rounding takes most of a token's input at {worst}",
            f"  KL with only {'this Site' if len(kinds.worst) == 1 else 'these Sites'} quantized: {kinds.together:.3f}",
        ]
    return [*lines, _verdict(found)]


def _verdict(found: Damage) -> str:
    where = next(iter(found.kinds.kinds))
    if not found.plain.costly:
        start = "static W8A8 stays close to the original model even without remedies"
    else:
        start = f"static W8A8 without remedies is far from the original model, mostly because of {where}"
    changes = [
        f"{step.remedy} {'removes' if removed > 0 else 'adds'} {abs(removed):.3f}"
        + ("" if step.built else " (disabled)")
        for step, removed in found.removed
    ]
    left = f"{found.built.distance:.3f} of {found.plain.distance:.3f} nats remain in a build"
    return f"{start}: {', '.join([*changes, left])}"


def _sink_sentence(found: Diagnosis) -> str:
    if not found.sinks:
        return "no attention sinks: no token is much larger than the others at the input of any linear"
    return f"attention sinks at {plural(len(found.sinks), 'position')}:"


def _prefix_sentence(found: Diagnosis) -> str:
    left = f"one common token as a prefix leaves {100 * found.relief:.0f} % of the quantization error"
    if found.prefix_pays and not found.prefix_allowed:
        return f"a prefix would pay, but the recipe disables it: {left}"
    if found.prefix_pays:
        return f"a prefix pays: {left}, and a search finds better ones"
    if found.sinks:
        return f"no common token takes the sinks' place: {left}; the search may find one that does"
    if found.damage.plain.costly:
        return f"no sink is to blame for the damage below, and no prefix would repair it: {left}"
    return f"no prefix is needed: {left}"
