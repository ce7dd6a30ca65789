"""Validation errors of pydantic as usage errors: what was found, what was expected, and the nearest setting."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

from pydantic import ValidationError

from cushion_deploy.errors import UsageError

PRINT_CONFIG = "`cushion-deploy build --print-config` prints every setting with its description"
"""The hint of every error about a recipe."""

_EXPECTED = {
    "model_type": "a mapping of settings",
    "tuple_type": "a list of strings",
    "invalid_key": "a string as key",
}
"""What was expected, by error type of pydantic, where its own message names Python types."""

# Not repr: YAML aliases can make a value of a few bytes exponentially large.
_REPR = reprlib.Repr()
_REPR.maxstring = 60


def usage_error(e: ValidationError, where: str, names: Sequence[str]) -> UsageError:
    """Return the first problem of a validation error as a UsageError.

    Args:
        e: the error of pydantic.
        where: what was validated, as the beginning of the message.
        names: every setting, by dotted name.
    """
    problems = e.errors(include_url=False)
    first = problems[0]
    name = ".".join(str(part) for part in first["loc"])
    more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        error = unknown_setting(name, names)
        return UsageError(where + error.message + more, hint=error.hint)
    if first["type"] == "value_error":
        return UsageError(f"{where}{name}: {first['ctx']['error']}{more}", hint=PRINT_CONFIG)
    expected = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be "))
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    hint = f"expected {expected}; {PRINT_CONFIG}"
    if first["type"] == "float_type" and isinstance(first["input"], str):
        hint = f"expected {expected}; YAML reads 1e-1 as a string, write 0.1 or 1.0e-1"
    found = "null" if first["input"] is None else _REPR.repr(first["input"])
    return UsageError(f"{where}{name} is {found}{more}", hint=hint)


def unknown_setting(name: str, names: Sequence[str]) -> UsageError:
    """Return the error for a setting that does not exist, with the nearest one that does.

    Args:
        name: the dotted name that was given.
        names: every setting, by dotted name.
    """
    sections = list(dict.fromkeys(n.partition(".")[0] for n in names if "." in n))
    if name in sections:
        inside = ", ".join(n for n in names if n.startswith(name + "."))
        return UsageError(f"'{name}' is a section, not a setting", hint=f"choose one of: {inside}")
    section, _, last = name.rpartition(".")
    siblings = [n for n in names if n.rpartition(".")[0] == section] + ([] if section else sections)
    near = (
        difflib.get_close_matches(name, siblings, n=1)
        or [n for n in names if n.rpartition(".")[2] == last]
        or difflib.get_close_matches(name, names, n=1)
    )
    if near:
        return UsageError(f"unknown setting '{name}'", hint=f"did you mean '{near[0]}'? {PRINT_CONFIG}")
    return UsageError(f"unknown setting '{name}'", hint=f"choose one of: {', '.join(siblings or names)}")
