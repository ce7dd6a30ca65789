"""The versions of other packages that this one admits, checked before anything is done with one that is too old."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement

from cushion_deploy.errors import MissingDependency

NAME = "cushion-deploy"
COMPUTE = ("build", "cpu", "report", "chat")
"""Extras of every command that computes with a model."""
_RUN = ("cpu", "chat")
EXTRAS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("build", "search", "tune", "calibrate", "export", "engine", "parity", "bench", "study"), COMPUTE),
    "eval": (*COMPUTE, "eval"),
    **dict.fromkeys(("generate", "chat"), _RUN),
    "serve": (*_RUN, "serve"),
    "push": ("hub",),
    "sign": ("sign",),
    "report": ("report",),
}
"""Extras whose packages a command uses; what it needs and is not installed, it reports itself.

Left out are `doctor` without a model, which reports every version, and engines other than ONNX Runtime, which check
their own library when it is loaded: a bundle runs without it.
"""


def require_versions(*extras: str) -> None:
    """Check the installed packages that the metadata of this package names; one that is not installed is left out.

    Nothing is checked in a source tree that is not installed, which has no metadata.

    Args:
        extras: the extras to check, in addition to what is always needed.

    Raises:
        MissingDependency: a version is not admitted; the hint is the command that installs one that is.
    """
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not is_admitted(requirement, found):
            raise MissingDependency(
                f"{requirement.name} {found} is installed, and {NAME} needs {requirement.name}{requirement.specifier}",
                hint=f"pip install '{requirement.name}{requirement.specifier}'",
            )


def is_admitted(requirement: Requirement, version: str) -> bool:
    """Return whether an installed version is one that a requirement admits.

    Builds for an accelerator are versions such as 2.13.0+cpu or 1.24.0.dev20, so those before a release count too.
    """
    return requirement.specifier.contains(version, prereleases=True)
