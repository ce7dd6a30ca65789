"""Errors that a person can act on, and the exit code each one ends the process with."""

from __future__ import annotations

from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """Exit codes of the command line; stable, scripts rely on them."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    MISSING = 3
    UNTRUSTED = 4
    BUG = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class CushionError(Exception):
    """An expected failure: what was found, what was expected, and what to do.

    Args:
        message: what went wrong, with the offending value.
        hint: what the user should do next; never empty.
    """

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CushionError):
    """Bad input: a flag, a file, a model or a text that cannot be used as given."""

    exit_code = ExitCode.USAGE


class CheckFailed(CushionError):
    """The work was done and a check of its result did not hold (parity, coverage, a quality bar)."""

    exit_code = ExitCode.CHECK_FAILED


class MissingDependency(CushionError):
    """A library, an extra or a device is not there; the hint carries the install line."""

    exit_code = ExitCode.MISSING


class UntrustedArtifact(CushionError):
    """A file is corrupt, altered, or of a kind that is never loaded (pickle, remote code)."""

    exit_code = ExitCode.UNTRUSTED


EXTRAS: dict[str, str] = {
    "torch": "build",
    "transformers": "build",
    "accelerate": "build",
    "gguf": "build",
    "datasets": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "junitparser": "build",
    "psutil": "build",
    "onnxruntime": "cpu",
    "jinja2": "report",
    "matplotlib": "report",
}
"""Import name of an optional library to the extra that installs it."""


def missing_module(name: str) -> MissingDependency:
    """Return the error for a library of ``EXTRAS`` that is not installed."""
    return MissingDependency(f"{name} is not installed", hint=f"pip install 'cushion-deploy[{EXTRAS[name]}]'")


def require_modules(*names: str) -> None:
    """Check that libraries of ``EXTRAS`` are installed, without importing them.

    Raises:
        MissingDependency: the first that is not, with the install line.
    """
    for name in names:
        if find_spec(name) is None:
            raise missing_module(name)


def unknown_choice(what: str, value: str, valid: list[str]) -> UsageError:
    """Return the error for a name that is not one of the valid ones."""
    return UsageError(f"unknown {what} '{value}'", hint=f"choose one of: {', '.join(valid)}")
