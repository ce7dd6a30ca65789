"""What `doctor` prints without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cushion_deploy.engines.readiness import Readiness
    from cushion_deploy.verbs.environment import Environment, Task


def environment_lines(found: Environment) -> list[str]:
    """Return the findings as lines of text."""
    present = [f"{name} {version}" for name, version in found.libraries.items() if version]
    absent = [name for name, version in found.libraries.items() if not version]
    lines = [
        f"cushion-deploy {found.version}, {found.python}",
        found.platform,
        f"processor: {found.processor}",
        f"GPUs: {', '.join(found.gpus) or 'none that a driver of NVIDIA sees'}",
        f"libraries: {', '.join(present)}",
    ]
    if absent:
        lines.append(f"not installed: {', '.join(absent)}")
    lines += ["", "engines:", *map(_engine_line, found.engines), "", "tasks:"]
    for task in found.tasks:
        lines += _task_lines(task)
    lines += [f"warning: {text}" for text in found.warnings]
    return [*lines, "", "`cushion-deploy doctor MODEL` examines a model before a build"]


def _engine_line(engine: Readiness) -> str:
    able = [word for word, able in (("compiles", engine.compiles), ("runs", engine.runs)) if able]
    what = " and ".join(able) + " here" if able else "does not run here"
    version = f" {engine.version}" if engine.version else ""
    return f"  {engine.name}{version}: {what}" + (f" ({engine.note})" if engine.note else "")


def _task_lines(task: Task) -> list[str]:
    if task.ready is None:
        return [f"  {task.what}: unknown, because the installed cushion-deploy does not list it; install it again"]
    if task.ready:
        return [f"  {task.what}: installed"]
    return [f"  {task.what}: missing {', '.join(task.missing)}", f"    {task.install}"]
