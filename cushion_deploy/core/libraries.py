"""The libraries that decide what this installation can do, and their versions, without importing any of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

from cushion_deploy.core.host import installed_versions

TOOL = "cushion-deploy"
LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("torch",),
        "transformers": ("transformers",),
        "onnx": ("onnx",),
        "onnx-ir": ("onnx-ir",),
        "onnxruntime": ("onnxruntime",),
        "onnxruntime-gpu": ("onnxruntime-gpu",),
        "openvino": ("openvino",),
        # NVIDIA names a distribution after the CUDA that it is for.
        "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        "cuda-bindings": ("cuda-bindings",),
        "numpy": ("numpy",),
        "safetensors": ("safetensors",),
        "tokenizers": ("tokenizers",),
        "huggingface-hub": ("huggingface-hub",),
        "fastapi": ("fastapi",),
        "llguidance": ("llguidance",),
        "lm-eval": ("lm-eval",),
    }
)
"""Name of each library in reports, and the distributions that may contain it."""
RUNNING = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
"""The libraries that compute something."""

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;.*\bextra\s*==\s*['\"]([\w-]+)['\"].*)?")
_BOUND = re.compile(r"(>=|==)\s*([\w.]+)")


@dataclass(frozen=True)
class Missing:
    """A distribution that an extra needs.

    Attributes:
        name: name of the distribution.
        wanted: the versions that are needed, such as ``>=2.8``.
        found: the installed version, which is not one of them; empty if there is none.
    """

    name: str
    wanted: str
    found: str = ""

    def __str__(self) -> str:
        """Return name, versions and what was found, in words."""
        return f"{self.name}{self.wanted}" + (f" (found {self.found})" if self.found else "")


def library_versions() -> dict[str, str | None]:
    """Return the version of every library of :data:`LIBRARIES`; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name, distributions in LIBRARIES.items():
        found[name] = next(iter(installed_versions(distributions).values()), None)
    return found


def missing_of_extra(extra: str) -> tuple[Missing, ...] | None:
    """Return what an extra of this distribution needs and this environment lacks; None if there is no such extra.

    The extras are those of the installed distribution; a source tree that is not installed has none.
    """
    try:
        own = metadata.metadata(TOOL)
    except metadata.PackageNotFoundError:
        return None
    if extra not in (own.get_all("Provides-Extra") or ()):
        return None
    return tuple(_missing(extra))


def _missing(extra: str) -> Iterator[Missing]:
    for text in metadata.requires(TOOL) or ():
        found = _REQUIREMENT.match(text)
        if found is None or found[3] != extra:
            continue
        name, wanted = found[1], found[2].strip()
        installed = installed_versions([name]).get(name, "")
        if not installed or not _within(installed, wanted):
            yield Missing(name, wanted, installed)


def _within(version: str, wanted: str) -> bool:
    """Return whether a version is within its bounds; only the kinds of bounds that pyproject.toml has are compared."""
    for sign, bound in _BOUND.findall(wanted):
        if sign == "==" and version != bound:
            return False
        if sign == ">=" and _numbers(version) < _numbers(bound):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version as numbers, such as ``(2, 13, 0)`` for ``2.13.0+cpu``."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
