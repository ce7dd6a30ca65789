"""Options that several commands share: the model, the recipe, overrides, the work folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cushion_deploy.cli.evaluation_options import EVALUATION_TEXT, TEXTS, eval_data_option
from cushion_deploy.cli.help import FILE, json_option, option
from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.processes import Processes, require_one_process
from cushion_deploy.core.scales import ESTIMATORS
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.recipe.text import parse_yaml
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.store.files import temporary_root

if TYPE_CHECKING:
    from cushion_deploy.cli.progress import Display

F = TypeVar("F", bound=Callable[..., Any])
WORK_DIR = Path(".cushion-work")

DTYPES: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Short names of floating-point types that options accept in addition to the long ones."""

FLAGS: dict[str, str] = {
    "model": "model",
    "revision": "revision",
    "precision": "precision",
    "seed": "seed",
    "calib_data": "calibration.data",
    "estimator": "calibration.estimator",
    "eval_data": "evaluation.data",
    "quantize_head": "export.quantize_head",
    "tune": "tuning.enabled",
    "smooth_alpha": "smoothing.alpha",
    "keep_float": "export.keep_float",
    "kv_cache": "export.kv_cache",
    "max_length": "search.max_length",
    "seed_tokens": "search.seed_tokens",
    "objective": "search.objective",
    "ship": "search.ship",
    "device": "compute.device",
    "compute_dtype": "compute.dtype",
    "max_batch": "tensorrt.max_batch",
    "max_context": "tensorrt.max_context",
    "max_prefill": "tensorrt.max_prefill",
    "plan_dtype": "tensorrt.dtype",
}
"""Recipe setting that each flag overrides; ``--set`` overrides all others."""


DEFAULTS = {setting.name: setting.default for setting in Recipe.settings()}


def default_of(setting: str) -> str:
    """Return the default of a setting of the recipe as help shows it."""
    return str(DEFAULTS[setting])


def model_option(function: F) -> F:
    """Add ``--model`` for a command that reads a bundle: the model that it was built from."""
    return option(
        "--model",
        heading="Model",
        metavar="MODEL",
        fallback="from the bundle's recipe",
        help="Original model of the bundle: GGUF file, Hugging Face folder, or hub id (org/name).",
    )(function)


revision_option = option(
    "--revision",
    heading="Model",
    metavar="REVISION",
    fallback="the main branch",
    help="Branch, tag or commit of a model on the hub.",
)

set_option = option(
    *("--set", "settings"),
    heading="Recipe",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change one setting of the recipe, such as search.tau=0.4. `build --print-config` lists all. Repeatable.",
)


def recipe_options(function: F) -> F:
    """Add the options that a recipe is made from, and those of :func:`run_options`."""
    options = [
        option(
            "--model",
            heading="Model",
            metavar="MODEL",
            help="GGUF file, Hugging Face folder, or hub id (org/name).",
        ),
        revision_option,
        option(
            "--precision",
            heading="Recipe",
            metavar="|".join(PRECISIONS),
            fallback=default_of("precision"),
            help="Precision of weights and activations.",
        ),
        option("--recipe", heading="Recipe", type=FILE, metavar="FILE", help="YAML file with settings."),
        set_option,
        option("--seed", heading="Recipe", type=int, fallback=default_of("seed"), help="Seed of all random numbers."),
        option(
            "--calib-data",
            heading="Calibration",
            metavar="DATA",
            fallback="topics of the Python language reference, and text sampled from the model",
            help=f"Text to calibrate on: {TEXTS}; self is text sampled from the model.",
        ),
        eval_data_option(
            f"Text to evaluate on: {TEXTS}. Must differ from the calibration text.",
            fallback=EVALUATION_TEXT,
        ),
        option(
            "--estimator",
            heading="Calibration",
            metavar="|".join(ESTIMATORS),
            fallback=default_of("calibration.estimator"),
            help="How the range of an activation is estimated.",
        ),
        option(
            "--quantize-head/--no-quantize-head",
            heading="Graph",
            default=None,
            fallback="no-quantize-head",
            help="Quantize the output head (lm_head) to INT8 as well.",
        ),
        option(
            "--tune/--no-tune",
            heading="Prefix",
            default=None,
            fallback="no-tune",
            help="Train the keys and values of the prefix after the search. Slow without a GPU.",
        ),
        option(
            "--smooth-alpha",
            heading="Calibration",
            type=float,
            fallback=default_of("smoothing.alpha"),
            help="Migration strength (alpha) of SmoothQuant, from 0 to 1.",
        ),
        option(
            "--keep-float",
            heading="Graph",
            multiple=True,
            metavar="SITE|auto:N",
            help="Keep a Site (an input that quantized linears share) in floating point, or the N most sensitive ones "
            "(auto:N). Repeatable.",
        ),
        option(
            "--kv-cache",
            heading="Graph",
            metavar="float|int8",
            fallback=default_of("export.kv_cache"),
            help="Type in which the key/value cache is stored.",
        ),
        option(
            "--max-length",
            heading="Prefix",
            type=int,
            fallback=default_of("search.max_length"),
            help="Maximum number of prefix tokens.",
        ),
        option(
            *("--seed-token", "seed_tokens"),
            heading="Prefix",
            multiple=True,
            metavar="TOKEN",
            help="Token that the prefix starts with. Repeatable.",
        ),
        option(
            "--objective",
            heading="Prefix",
            metavar="error|max",
            fallback=default_of("search.objective"),
            help="What the search minimizes: the quantization error, or the largest activation.",
        ),
        option(
            "--exhaustive",
            heading="Prefix",
            is_flag=True,
            help="Score every token of the vocabulary instead of a selection. Far slower; an interrupted search "
            "resumes.",
        ),
        option("--no-prefix", heading="Prefix", is_flag=True, help="Use no prefix, and skip the search."),
    ]
    function = run_options(function)
    for each in reversed(options):
        function = each(function)
    return function


def prefix_option(fallback: str) -> Callable[[F], F]:
    """Return an option for the file of a prefix."""
    return option(
        *("--prefix", "prefix_file"),
        heading="Prefix",
        type=FILE,
        metavar="FILE",
        fallback=fallback,
        help="Prefix to use, as `search` writes it (prefix.safetensors).",
    )


def device_option(function: F) -> F:
    """Add ``--device``."""
    return option(
        "--device",
        heading="Computation",
        metavar="auto|cpu|cuda[:N]|mps",
        fallback="auto, which is a GPU if there is one",
        help="Device on which torch runs the model.",
    )(function)


def compute_options(function: F) -> F:
    """Add ``--device`` and ``--dtype``: where and in which type torch runs the model."""
    dtype = option(
        *("--dtype", "compute_dtype"),
        heading="Computation",
        type=click.Choice(["auto", *DTYPES, *DTYPES.values()]),
        metavar="auto|fp32|bf16|fp16",
        callback=lambda _, __, value: DTYPES.get(value, value),
        fallback="auto, which is fp32 on a CPU and the type of the checkpoint on a GPU",
        help="Floating-point type in which torch computes.",
    )
    return device_option(dtype(function))


def compute_settings(device: str | None, dtype: str | None) -> dict[str, object]:
    """Return the settings of :func:`compute_options` for the recipe of a bundle, which may be from another machine."""
    return {"compute.device": device or "auto", "compute.dtype": dtype or "auto", "compute.memory": None}


def work_dir_option(what: str = "Folder of finished stages, which later runs reuse.") -> Callable[[F], F]:
    """Return an option for the work folder."""
    return option("--work-dir", heading="Computation", type=FILE, metavar="FOLDER", default=WORK_DIR, help=what)


def run_options(function: F) -> F:
    """Add the options of every command that runs stages on a model: the work folder and the output."""
    quiet = option("--quiet", heading="Output", is_flag=True, help="Show no progress on stderr.")
    return work_dir_option()(json_option()(quiet(function)))


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Return the recipe of :func:`recipe_options`: the file, overridden by flags, overridden by ``--set``.

    Raises:
        UsageError: the file cannot be read, or a setting is unknown or invalid.
    """
    recipe = Recipe.load(values["recipe"]) if values["recipe"] else Recipe()
    # A flag that was not given is None, or an empty tuple if it is repeatable.
    given = {flag: value for flag, value in values.items() if value not in (None, ())}
    overrides: dict[str, object] = {setting: given[flag] for flag, setting in FLAGS.items() if flag in given}
    if values["exhaustive"]:
        overrides["search.mode"] = "exhaustive"
    if values["no_prefix"]:
        overrides["search.enabled"] = False
    if values.get("engines"):
        overrides["engines"] = names(values["engines"])
    overrides |= parse_settings(values["settings"])
    return recipe.merged(overrides)


def parse_settings(texts: Sequence[str]) -> dict[str, object]:
    """Parse the values of ``--set NAME=VALUE``, each VALUE as YAML.

    Raises:
        UsageError: a text has no ``=``, or its value is not valid YAML.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--set {text}: '=' is missing", hint="write --set search.tau=0.4")
        try:
            found[name] = parse_yaml(value)
        except ValueError as e:
            raise UsageError(
                f"--set {text}: {value!r} is not valid YAML: {e}", hint="quote text that has special characters"
            ) from e
    return found


def make_run(work_dir: Path, progress: Display) -> Run:
    """Return a run on a work folder, in one process.

    Raises:
        UsageError: torchrun started several processes, or there is no folder for temporary files.
    """
    temporary_root()  # some stages need one, after minutes
    require_one_process(str(click.get_current_context().info_name))
    return Run(StageStore(work_dir), progress, watcher=progress)


def make_shared_run(work_dir: Path, progress: Display, recipe: Recipe) -> Run:
    """Return a run on a work folder whose work all processes of torchrun share; they are connected until the end.

    Raises:
        UsageError: the recipe asks for a device that is not there, or there is no folder for temporary files.
    """
    temporary_root()
    processes = Processes.of_torchrun()
    if processes.size > 1:
        from cushion_deploy.modeling.processes import join, leave

        join(processes, recipe.compute.device)
        click.get_current_context().call_on_close(leave)
    if not processes.leads:
        return Run(StageStore(work_dir), processes=processes)
    return Run(StageStore(work_dir), progress, processes=processes, watcher=progress)


def names(values: Sequence[str]) -> list[str]:
    """Split the comma-separated values of a repeatable option into single names."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
