"""The libraries that decide what this installation can do, and their versions, without importing any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

from packaging.requirements import Requirement

from cushion_deploy.core.host import installed_versions
from cushion_deploy.dependencies import is_admitted

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
    for requirement in map(Requirement, metadata.requires(TOOL) or ()):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        installed = installed_versions([requirement.name]).get(requirement.name, "")
        if not installed or not is_admitted(requirement, installed):
            yield Missing(requirement.name, str(requirement.specifier), installed)
