"""Expected errors, each with a message, a hint and the exit code of the process."""

from __future__ import annotations

from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """Exit codes of the command line. They are stable: scripts rely on them."""

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
    """An expected failure.

    Args:
        message: what was found and what was expected, with the offending value.
        hint: what to do about it; never empty.
    """

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CushionError):
    """Bad input: a flag, file, model or text that cannot be used."""

    exit_code = ExitCode.USAGE


class CheckFailed(CushionError):
    """A check of a finished result failed: parity, INT8 coverage, or a quality limit."""

    exit_code = ExitCode.CHECK_FAILED


class MissingDependency(CushionError):
    """A library, an extra or a device is missing; the hint gives the command that installs it."""

    exit_code = ExitCode.MISSING


class UntrustedArtifact(CushionError):
    """A file is corrupt or altered, or of a kind that is never loaded (pickle, remote code)."""

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
    "openvino": "openvino",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "serve",
    "model_signing": "sign",
    "jinja2": "report",
    "matplotlib": "report",
}
"""Extra that installs each optional library, by import name."""


def missing_module(name: str) -> MissingDependency:
    """Return the error for a library of :data:`EXTRAS` that is not installed."""
    return MissingDependency(f"{name} is not installed", hint=f"pip install 'cushion-deploy[{EXTRAS[name]}]'")


def require_modules(*names: str) -> None:
    """Check that libraries of :data:`EXTRAS` are installed, without importing them.

    Raises:
        MissingDependency: a library is not installed; the first one is named.
    """
    for name in names:
        if find_spec(name) is None:
            raise missing_module(name)


def unknown_choice(what: str, value: str, valid: list[str]) -> UsageError:
    """Return the error for a name that is not among the valid ones."""
    return UsageError(f"unknown {what} '{value}'", hint=f"choose one of: {', '.join(valid)}")
