"""Options that several commands share: the model, the recipe, overrides, the work folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

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


def recipe_options(function: F) -> F:
    """Add the options that a recipe is made from, and those of :func:`run_options`."""
    options = [
        click.option("--model", metavar="MODEL", help="GGUF file, Hugging Face folder, or hub id (org/name)."),
        click.option("--revision", help="Revision of a hub model."),
        click.option("--precision", metavar="NAME", help=f"Precision: {', '.join(PRECISIONS)}."),
        click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with settings."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="Override any setting of the recipe; `build --print-config` lists them.",
        ),
        click.option("--seed", type=int, help="Seed of all random numbers."),
        click.option("--calib-data", metavar="DATA", help="Calibration text: a file, wikitext, c4, org/name, or self."),
        click.option(
            "--eval-data", metavar="DATA", help="Text to measure perplexity on; must differ from the calibration text."
        ),
        click.option("--estimator", metavar="NAME", help=f"Range estimator: {', '.join(ESTIMATORS)}."),
        click.option(
            "--quantize-head/--no-quantize-head",
            default=None,
            help="Quantize the output head to INT8 as well.",
        ),
        click.option("--tune/--no-tune", default=None, help="Tune the prefix (tuning.loss)."),
        click.option("--smooth-alpha", type=float, help="Migration strength (alpha) of SmoothQuant, 0 to 1."),
        click.option(
            "--keep-float",
            multiple=True,
            metavar="SITE|auto:N",
            help="Site to keep in floating point, or auto:N for the N most sensitive ones; repeatable.",
        ),
        click.option("--kv-cache", metavar="NAME", help="Storage of the key/value cache: float or int8."),
        click.option("--max-length", type=int, help="Maximum number of prefix tokens."),
        click.option(
            "--seed-token", "seed_tokens", multiple=True, help="Token that the prefix begins with; repeatable."
        ),
        click.option("--objective", metavar="NAME", help="Objective of the search: error or max."),
        click.option("--exhaustive", is_flag=True, help="Score every token of the vocabulary exactly; resumable."),
        click.option("--no-prefix", is_flag=True, help="Build without a prefix."),
    ]
    function = run_options(function)
    for option in reversed(options):
        function = option(function)
    return function


def device_option(function: F) -> F:
    """Add ``--device``."""
    return click.option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps",
        help="Device that runs the model in torch. Default: a GPU, or the CPU.",
    )(function)


def compute_options(function: F) -> F:
    """Add ``--device`` and ``--dtype``: where and in which type torch runs the model."""
    dtype = click.option(
        *("--dtype", "compute_dtype"),
        type=click.Choice(["auto", *DTYPES, *DTYPES.values()]),
        metavar="auto|fp32|bf16|fp16",
        callback=lambda _, __, value: DTYPES.get(value, value),
        help="Type that torch computes in. Default: fp32 on a CPU, the checkpoint's own on a GPU.",
    )
    return device_option(dtype(function))


def compute_settings(device: str | None, dtype: str | None) -> dict[str, object]:
    """Return the settings of :func:`compute_options` for the recipe of a bundle, which may be from another machine."""
    return {"compute.device": device or "auto", "compute.dtype": dtype or "auto", "compute.memory": None}


def run_options(function: F) -> F:
    """Add the options of every command that runs stages on a model: the work folder and the output."""
    options = [
        click.option(
            "--work-dir",
            type=click.Path(path_type=Path),
            default=WORK_DIR,
            show_default=True,
            help="Folder for finished stages; later runs reuse them.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--quiet", is_flag=True, help="Do not show progress on stderr."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


target_option = click.option(
    *("--target", "--targets", "targets"),
    multiple=True,
    metavar="TARGET",
    help="GPU architecture to compile TensorRT plans for, e.g. sm86; comma-separated or repeated.",
)

float_linears_option = click.option(
    "--allow-float-linears",
    type=click.IntRange(min=0),
    default=0,
    help="Number of linears that may stay in floating point.",
)


def split_targets(given: Sequence[str]) -> tuple[str, ...]:
    """Return the values of :data:`target_option` as single targets."""
    return tuple(target.strip() for text in given for target in text.split(",") if target.strip())


def dtype_option(
    flag: str, name: str, help_text: str, default: str | None = None, *, auto: bool = False
) -> Callable[[F], F]:
    """Return an option for the type of a graph, whose value is the long name of a type, or ``auto`` if allowed."""
    more = ["auto"] if auto else []
    return click.option(
        *(flag, name),
        type=click.Choice([*more, *DTYPES, *DTYPES.values()]),
        metavar="|".join((*more, "fp16", "bf16", "fp32")),
        default=default,
        show_default=default is not None,
        callback=lambda _, __, value: DTYPES.get(value, value),
        help=help_text,
    )


def engine_option(help_text: str) -> Callable[[F], F]:
    """Return an option for the engine to run on."""
    return click.option("--engine", metavar="NAME", help=f"{help_text} Default: onnxruntime, on the CPU.")


def engines_option(help_text: str) -> Callable[[F], F]:
    """Return an option for the engines to run on."""
    return click.option("--engine", "engines", multiple=True, metavar="NAMES", help=f"Comma-separated. {help_text}")


def plan_options(function: F) -> F:
    """Add the options of TensorRT plans, which default to the settings of the recipe: type, optimization profiles."""
    for option in (
        click.option(
            "--max-prefill", type=int, help="Maximum number of prompt tokens per call. Default: from the recipe."
        ),
        click.option("--max-context", type=int, help="Maximum context of TensorRT profiles. Default: from the recipe."),
        click.option("--max-batch", type=int, help="Maximum batch of TensorRT profiles. Default: from the recipe."),
        dtype_option(
            "--plan-dtype",
            "plan_dtype",
            "Type of TensorRT plans: auto is fp16 where the values measured on the calibration text fit, else bf16. "
            "Default: from the recipe, auto.",
            auto=True,
        ),
    ):
        function = option(function)
    return function


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
        overrides["engines"] = list(values["engines"])
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


def scored_text(recipe: Recipe, window: int | None, max_tokens: int | None) -> dict[str, object]:
    """Return the settings that ``--window`` and ``--max-tokens`` override, so that at least one window is scored."""
    given: dict[str, object] = {}
    if window is not None:
        given["evaluation.window"] = window
        if recipe.evaluation.max_tokens is not None:
            given["evaluation.max_tokens"] = max(window, recipe.evaluation.max_tokens)
    if max_tokens is not None:
        given["evaluation.max_tokens"] = max_tokens
    return given


def names(values: Sequence[str]) -> list[str]:
    """Split the comma-separated values of a repeatable option into single names."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
