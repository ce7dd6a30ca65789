"""Errors that a person can act on, and the exit code each one ends the process with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line; stable, scripts rely on them."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    MISSING = 3
    UNTRUSTED = 4
    BUG = 70
    INTERRUPTED = 130
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


def unknown_choice(what: str, value: str, valid: list[str]) -> UsageError:
    """Return the error for a name that is not one of the valid ones."""
    return UsageError(f"unknown {what} '{value}'", hint=f"choose one of: {', '.join(valid)}")
