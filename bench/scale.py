"""Search, smoothing, calibration, tuning and export of a model as large as LLaMA3-8B: time and peak memory of each.

    python bench/scale.py --shape 8b --device cuda --dtype bf16

The model has random weights and a planted attention sink (``planted_model.py``), so the search has something to find.
Every step is one command of the command line in a process of its own; they share the work folder, so each does only its
own work. `calibrate` does smoothing and calibration. The time of a step is that of its process: it includes loading the
libraries and the model, and for the first command hashing the checkpoint, which a build does only once.

The paper needs 12.09 hours for the search and 3.70 hours for the tuning of LLaMA3-8B on four A6000 (Table 6). It tunes
for two epochs, on a text whose length it does not state; here epochs and windows are the recipe's, unless flags set
others. The goal for ``8b`` is 20 minutes and 40 GB for search, calibration and tuning.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
from planted_model import SHAPES, write_model, write_text

from cushion_deploy.cli.main import cli
from cushion_deploy.cli.main import main as command_line
from cushion_deploy.cli.options import parse_settings
from cushion_deploy.core.host import cpu_description, installed_versions, own_peak_memory
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.windows import WINDOW

STEPS = ("write", "search", "calibrate", "tune", "export")
JUDGED = ("search", "calibrate", "tune")
GOAL_SHAPE, GOAL_SECONDS, GOAL_BYTES = "8b", 20 * 60, 40e9
LIBRARIES = ("torch", "transformers", "safetensors", "onnx-ir", "numpy")
RESULT = "result.json"


def main() -> None:
    """Run the steps in child processes and print the measurements as one JSON object; or run one step as a child."""
    given = _parser().parse_args()
    if given.step:
        print(json.dumps(_child(given)))
        return
    # Created only after the options have been checked.
    given.folder = given.folder or Path(tempfile.gettempdir()) / f"cushion-scale-{os.getpid()}"
    result = _open_result(given)
    try:
        error = _measure(given, result)
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)
    result["goal"] = _goal(result["steps"]) if given.shape == GOAL_SHAPE else None
    print(json.dumps(result, indent=1))
    sys.exit(error)


def _parser() -> argparse.ArgumentParser:
    tuning = Recipe().tuning
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", help="passed to the commands, and where the weights are drawn; default: the CPU")
    parser.add_argument("--dtype", help="passed to the commands: type that the model runs in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=tuning.epochs, help="of the tuning")
    parser.add_argument("--windows", type=int, default=tuning.windows, help="that the tuning trains on")
    parser.add_argument("--window", type=int, default=tuning.window, help="tokens in a window of the tuning")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of the recipe")
    parser.add_argument("--graph-dtype", help="`export --dtype`: type of what is not INT8 in the graph")
    parser.add_argument("--folder", type=Path, help="new folder for all files; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument(
        "--steps",
        type=_steps,
        default=STEPS,
        help=f"comma-separated, of {','.join(STEPS)}; with --keep and the same options a later run does the others",
    )
    parser.add_argument("--verbose", action="store_true", help="show the progress of the commands")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser


def _steps(text: str) -> tuple[str, ...]:
    """Return the steps of ``--steps`` in their order."""
    named = text.split(",")
    if unknown := sorted(set(named) - set(STEPS)):
        raise argparse.ArgumentTypeError(f"unknown step {', '.join(unknown)}; choose from {','.join(STEPS)}")
    return tuple(step for step in STEPS if step in named)


def _open_result(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result so far of the folder, and check that the chosen steps can be measured in it."""
    for step in given.steps:
        if unknown := _unknown_options(given, step):
            sys.exit(f"`{step}` of this version has no option {', '.join(unknown)}")
    own = ("folder", "keep", "steps", "step", "verbose")
    options = {name: value for name, value in vars(given).items() if name not in own}
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / RESULT
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["options"] != options:
            sys.exit(f"{given.folder} contains steps with other options: {found['options']}")
        if done := [step for step in given.steps if step in found["steps"]]:
            sys.exit(f"{given.folder} already contains {', '.join(done)}, which a second run would only reuse")
        return found
    if any(given.folder.iterdir()):
        sys.exit(f"{given.folder} is not empty; choose a new folder")
    versions = {"python": platform.python_version(), **installed_versions(LIBRARIES)}
    return {"options": options, "machine": {"cpu": cpu_description()}, "versions": versions, "steps": {}}


def _unknown_options(given: argparse.Namespace, step: str) -> list[str]:
    """Return the options for the command of a step that the command does not have."""
    if step == "write":
        return []
    command = cli.get_command(click.Context(cli), step)
    known = {option for parameter in command.params for option in parameter.opts} if command else set()
    return [text for text in _arguments(given, step) if text.startswith("--") and text not in known]


def _measure(given: argparse.Namespace, result: dict[str, Any]) -> str | None:
    """Run the steps, show each as a row of a table on stderr, and return what failed."""
    _row("step", "seconds", "peak RSS", "peak on device", "found")
    for step in given.steps:
        # A command that was interrupted would resume, and its time would not be all of it.
        shutil.rmtree(given.folder / "work" / "scratch", ignore_errors=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(given.folder), "--step", step]
        # The digests of this checkpoint do not belong into the user's cache.
        environment = {**os.environ, "CUSHION_CACHE_DIR": str(given.folder / "cache")}
        errors = None if given.verbose else subprocess.PIPE
        begin = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False)
        seconds = round(time.monotonic() - begin, 2)
        if done.returncode:
            return f"{step} failed after {seconds} s with code {done.returncode}:\n{(done.stderr or '')[-4000:]}"
        found = json.loads(done.stdout.splitlines()[-1])
        if device := found.pop("device", None):
            result["machine"]["device"] = device
        result["steps"][step] = {"seconds": seconds, **found}
        (given.folder / RESULT).write_text(json.dumps(result))
        _row(step, f"{seconds:.1f}", _gb(found["peak_rss_bytes"]), _gb(found.get("peak_device_bytes")), found["found"])
    return None


def _row(step: str, seconds: str, rss: str, device: str, found: object) -> None:
    print(f"{step:<10} {seconds:>8} {rss:>10} {device:>14}  {found}", file=sys.stderr, flush=True)


def _gb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"


def _goal(steps: dict[str, Any]) -> dict[str, Any] | None:
    """Return the goal and whether it was met; None if a step is missing. Without a device it is the host's memory."""
    if not all(step in steps for step in JUDGED):
        return None
    seconds = sum(steps[step]["seconds"] for step in JUDGED)
    peak = max(steps[step].get("peak_device_bytes", steps[step]["peak_rss_bytes"]) for step in JUDGED)
    found = {"steps": JUDGED, "seconds": round(seconds, 2), "peak_bytes": peak}
    limits = {"seconds_limit": GOAL_SECONDS, "bytes_limit": int(GOAL_BYTES)}
    return {**found, **limits, "met": seconds <= GOAL_SECONDS and peak <= GOAL_BYTES}


def _child(given: argparse.Namespace) -> dict[str, Any]:
    """Run a step in this process and return its peaks and what it found."""
    found = _write(given) if given.step == "write" else _command(given)
    return {"peak_rss_bytes": own_peak_memory(), **_device_facts(), "found": found}


def _device_facts() -> dict[str, Any]:
    """Return the GPU and the peak of its memory if this process used one."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    device = max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_allocated)
    return {
        "device": torch.cuda.get_device_name(device),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device),
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _write(given: argparse.Namespace) -> dict[str, Any]:
    """Write the model and a text that is long enough for every step."""
    import torch

    shape, recipe, device = SHAPES[given.shape], _recipe(given), given.device or "cpu"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = given.folder / "model"
    parameters = write_model(model, shape, device, given.seed)
    calibration, tuning = recipe.calibration, recipe.tuning
    tokens = max(
        recipe.search.text_tokens,
        calibration.windows * (calibration.window or WINDOW),
        (tuning.windows + tuning.held_out) * tuning.window,
    )
    write_text(given.folder / "text.txt", shape, tokens, given.seed)
    size = sum(file.stat().st_size for file in model.iterdir())
    return {"parameters": parameters, "bytes": size, "text_tokens": tokens, "absorbers": shape.absorbers}


def _recipe(given: argparse.Namespace) -> Recipe:
    """Return the settings that decide how much text is needed."""
    return Recipe().merged(parse_settings(_settings(given)))


def _settings(given: argparse.Namespace) -> list[str]:
    """Return the settings of the recipe, NAME=VALUE."""
    tuning = {"epochs": given.epochs, "windows": given.windows, "window": given.window}
    return [*(f"tuning.{name}={value}" for name, value in tuning.items()), *given.set]


def _command(given: argparse.Namespace) -> dict[str, Any]:
    """Run a command and return the essence of its output."""
    printed = io.StringIO()
    (given.folder / "calibrated").mkdir(exist_ok=True)
    try:
        with redirect_stdout(printed):
            command_line([given.step, *_arguments(given, given.step)])
    except SystemExit as end:
        if end.code:
            raise
    return FOUND[given.step](json.loads(printed.getvalue()))


def _arguments(given: argparse.Namespace, step: str) -> list[str]:
    """Return the arguments of a command."""
    folder, tuned = given.folder, given.folder / "tuned"
    output = {
        "search": folder / "prefix.safetensors",
        "calibrate": folder / "calibrated" / "scales.json",
        "tune": tuned,
        "export": folder / "graph",
    }
    found = ["--model", folder / "model", "--calib-data", folder / "text.txt", "--work-dir", folder / "work"]
    found += ["--output", output[step], "--json", "--seed", given.seed]
    found += [part for text in _settings(given) for part in ("--set", text)]
    found += ["--device", given.device] if given.device else []
    # The `--dtype` of `export` is the type of the graph.
    dtype = given.graph_dtype if step == "export" else given.dtype
    found += ["--dtype", dtype] if dtype else []
    if step == "export":
        smoothing = tuned / "smoothing.safetensors"
        found += ["--prefix", tuned / "prefix.safetensors", "--scales", tuned / "scales.json"]
        found += ["--smoothing", smoothing] if smoothing.exists() else []
    return [str(part) for part in found]


def _found_by_search(trace: dict[str, Any]) -> dict[str, Any]:
    steps = [(step["best"]["token_id"], step["best"]["objective"] / step["before"]) for step in trace["steps"]]
    return {
        "prefix": trace["token_ids"],
        "best_tokens": [token for token, _ in steps],
        "leaves": [round(ratio, 6) for _, ratio in steps],
        "screen_layers": [step["screen_layers"] for step in trace["steps"]],
        "positions_scored": trace["positions_scored"],
        "positions_full_scan": trace["positions_full_scan"],
        "stopped": trace["stopped"],
        "seconds_of_search": round(trace["seconds"], 2),
    }


def _found_by_calibration(scales: dict[str, Any]) -> dict[str, Any]:
    return {"sites": len(scales["scales"]), "tokens": scales["tokens"], "estimator": scales["estimator"]}


def _found_by_tuning(trace: dict[str, Any]) -> dict[str, Any]:
    losses = [state["held_out"] for state in trace["states"]]
    return {
        "optimizer_steps": trace["steps"],
        "skipped": trace["skipped"],
        "untuned": losses[0],
        "tuned": min((loss for loss in losses if loss is not None), default=None),
        "seconds_of_tuning": round(trace["seconds"], 2),
    }


def _found_by_export(graph: dict[str, Any]) -> dict[str, Any]:
    return {"int8_linears": sum(graph["sites"].values()) if graph["quantized"] else 0, "opset": graph["opset"]}


FOUND = {
    "search": _found_by_search,
    "calibrate": _found_by_calibration,
    "tune": _found_by_tuning,
    "export": _found_by_export,
}

if __name__ == "__main__":
    main()
