"""Numpy and torch meet in the runner, and in what it consists of; only there is a device chosen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cushion_deploy"
PARTS = ("runner", "checkpoint", "stored_tensor", "placement", "input_rotations", "processes")
RUNNER = {PACKAGE / "modeling" / f"{name}.py" for name in PARTS}
"""The runner, the tensors that it reads and places, and the processes that it combines results with."""
CONVERSIONS = {"torch.from_numpy", "torch.tensor", "torch.as_tensor", "torch.asarray", ".numpy"}
MOVES = {".cpu", ".cuda"}
FACTORIES = {f"torch.{name}" for name in ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")}
DRAWS = {f"torch.{name}" for name in ("rand", "randint", "randn", "randperm")}


def torch_modules() -> list[Path]:
    """Return the modules that import torch, except the runner."""
    parts = [PACKAGE, *(PACKAGE / name for name in ("calib", "engines", "export"))]
    files = {file for part in parts for file in part.rglob("*.py")} - RUNNER
    return sorted(file for file in files if "import torch" in file.read_text() or "from torch" in file.read_text())


def calls(code: str) -> Iterator[tuple[int, str, ast.Call]]:
    """Yield line, name and node of every call: ``torch.zeros`` for a function, ``.numpy`` for a method."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            yield node.lineno, f"torch.{node.func.attr}" if of_torch else f".{node.func.attr}", node


def moves(name: str, node: ast.Call) -> bool:
    """Return whether a call moves a tensor to a device; ``to`` may only change the type."""
    if name == ".to":
        given = [ast.unparse(argument) for argument in node.args] + [str(keyword.arg) for keyword in node.keywords]
        return any("device" in text or text.startswith("'") for text in given)
    return name in MOVES


def places(name: str, node: ast.Call) -> bool:
    """Return whether a call creates a tensor on the default device; draws from a generator belong on the CPU."""
    return name in FACTORIES or (name in DRAWS and "generator" not in {keyword.arg for keyword in node.keywords})


def violations(code: str) -> list[str]:
    """Return the calls of a module that belong in the runner."""
    return [
        f"line {line}: {ast.unparse(node)}"
        for line, name, node in calls(code)
        if name in CONVERSIONS or moves(name, node) or places(name, node)
    ]


def test_there_are_modules_to_check() -> None:
    found = {file.relative_to(PACKAGE).as_posix() for file in torch_modules()}
    assert found >= {"modeling/simulate.py", "calib/calibrate.py", "prefix/tune.py", "parity/reference.py"}


@pytest.mark.parametrize("file", torch_modules(), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_only_the_runner_converts_moves_or_places_tensors(file: Path) -> None:
    assert violations(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.from_numpy(x)",
        "x.detach().numpy()",
        "torch.tensor([1])",
        "torch.as_tensor(x)",
        "x.cpu()",
        "x.to(device)",
        "x.to(model.device)",
        "x.to('cuda')",
        "x.to(device=d)",
        "torch.zeros(3)",
        "torch.arange(3)",
        "torch.randint(3, (1,))",
    ],
)
def test_each_of_these_is_found(line: str) -> None:
    assert len(violations(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["x.to(torch.int8)", "x.to(kind)", "x.new_zeros(3)", "torch.randint(3, (1,), generator=g)", "model.tensor(x)"],
)
def test_each_of_these_is_allowed(line: str) -> None:
    assert violations(line) == []
