"""The fingerprint of a stage: a digest of the code that decides its artifact, without words and comments.

Run as a program, it records the fingerprints of today:

    python tests/stages/fingerprint.py
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import cushion_deploy
import cushion_deploy.stages
import cushion_deploy.study.stages
from cushion_deploy.stages.base import Stage

ROOT = Path(cushion_deploy.__file__).parent
RECORD = Path(__file__).with_name("fingerprints.json")
IGNORED = (
    "cushion_deploy.cli",
    "cushion_deploy.core.progress",
    "cushion_deploy.errors",
    "cushion_deploy.printable",
    "cushion_deploy.report",
    "cushion_deploy.runtime",
    "cushion_deploy.store",
)
"""What decides no artifact: how work is kept, reported and read back."""
SHARED = tuple(f"cushion_deploy.stages.{name}" for name in ("chat", "observation", "scores", "windows"))
"""Modules beside the stages that compute. Another stage is an input: its digest identifies what it computes."""


def stages() -> dict[str, type[Stage[Any]]]:
    """Return every stage of the project by its name."""
    for module in pkgutil.iter_modules(cushion_deploy.stages.__path__, "cushion_deploy.stages."):
        importlib.import_module(module.name)
    found: dict[str, type[Stage[Any]]] = {}
    pending = list(Stage.__subclasses__())
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if not inspect.isabstract(kind) and kind.__module__.startswith("cushion_deploy."):
            found[kind.name] = kind
    return dict(sorted(found.items()))


def fingerprint(stage: type[Stage[Any]]) -> str:
    """Return the SHA-256 (hex, 16 digits) over the module of a stage and what that imports of the project."""
    h = hashlib.sha256()
    for module in sorted(_imported(stage.__module__)):
        h.update(f"{module}:{_code(module)};".encode())
    return h.hexdigest()[:16]


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imported(module: str) -> set[str]:
    """Return a module and all of the project that it imports, within functions too, directly or not."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        another = name.startswith("cushion_deploy.stages.") and name not in (module, *SHARED)
        file = None if another or name in found or name.startswith(IGNORED) else _file(name)
        if file is None:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cushion_deploy"):
                pending += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _code(module: str) -> str:
    """Return the code of a module with docstrings left out, and with what is said in errors."""
    file = _file(module)
    tree = ast.parse(file.read_text() if file else "")
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not _is_text(n)] or [ast.Pass()]
        if isinstance(node, ast.Raise):
            node.exc = node.cause = None
        if isinstance(node, ast.JoinedStr):  # Some versions of Python end a format with an empty string.
            node.values = [n for n in node.values if not (isinstance(n, ast.Constant) and n.value == "")]
    return _plain(tree)


def _plain(value: object) -> str:
    """Return the code of a node in the same words under every Python: fields that are empty, or only say how a name is
    used, are left out, because versions differ in them."""
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [(name, field) for name, field in ast.iter_fields(value) if name not in ("ctx", "kind")]
    given = [f"{name}={_plain(field)}" for name, field in fields if field is not None and field != []]
    return f"{type(value).__name__}({','.join(given)})"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def recorded() -> dict[str, dict[str, Any]]:
    """Return what was recorded: stage to its version and its fingerprint."""
    found: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
    return found


def record() -> None:
    """Write down the versions and fingerprints of today."""
    rows = {name: {"version": kind.version, "code": fingerprint(kind)} for name, kind in stages().items()}
    RECORD.write_text(json.dumps(rows, indent=1) + os.linesep)


if __name__ == "__main__":
    record()
    print(f"recorded {len(stages())} stages in {RECORD}", file=sys.stderr)
