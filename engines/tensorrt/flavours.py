"""Every difference between TensorRT-RTX and standard TensorRT; all other code is the same for both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cushion_deploy.errors import MissingDependency, UsageError


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: name of the engine.
        module: Python module of the library.
        product: name of the library in messages.
        extra: pip extra that installs it.
        oldest: oldest supported version.
        cache_update: first version whose parser maps TensorScatter to KVCacheUpdate.
        ahead_of_time: whether plans are built without a device, for any of :attr:`targets`; otherwise they are built on
            the device that they run on, and for that one only.
        targets: compute capabilities that it builds for ahead of time; empty if it needs the device.
        default_targets: targets to build for if none is named.
        refused: compute capabilities that it does not support, with the reason.
        tool: the vendor's command line tool that builds the same plan.
        issues: issue tracker of the library.
    """

    name: str
    module: str
    product: str
    extra: str
    oldest: tuple[int, int]
    cache_update: tuple[int, int]
    ahead_of_time: bool
    targets: tuple[str, ...]
    default_targets: tuple[str, ...]
    tool: str
    issues: str
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def install(self) -> str:
        """Install command."""
        return f"pip install 'cushion-deploy[{self.extra}]'"

    def require_version(self, version: str) -> None:
        """Check a version of the library; raises MissingDependency if it is too old."""
        if _numbers(version) < self.oldest:
            wanted = ".".join(map(str, self.oldest))
            raise MissingDependency(f"{self.product} {version} is older than {wanted}", hint=self.install)

    def has_cache_update(self, version: str) -> bool:
        """Return whether a version updates a static cache in place."""
        return _numbers(version) >= self.cache_update

    def choose_targets(self, names: Sequence[str], gpus: Sequence[str]) -> tuple[str, ...]:
        """Return the targets to build for, in ascending order, without repetition.

        Args:
            names: targets asked for, such as ``sm86``; empty for the default.
            gpus: GPUs of this machine, ``sm<major><minor> <name>``; a library that needs the device builds for the
                first.

        Raises:
            UsageError: an unknown target, or another one than the device here; the hint lists the valid ones.
        """
        chosen = {name.lower() for name in names}
        if not self.ahead_of_time:
            here = gpus[0].partition(" ")[0] if gpus else ""
            for name in sorted(chosen - {here}):
                raise UsageError(
                    f"{self.product} builds only for the device here, {gpus[0] if gpus else 'and there is none'}, "
                    f"not for {name}",
                    hint=f"omit --targets and build on a machine with {name}"
                    + (", or ahead of time with tensorrt-rtx" if name in RTX.targets else ""),
                )
            return (here,)
        chosen = chosen or set(self.default_targets)
        for name in sorted(chosen - set(self.targets)):
            known = f"choose among: {', '.join(self.targets)}"
            if name in self.refused:
                raise UsageError(f"target '{name}' is not supported; it is {self.refused[name]}", hint=known)
            raise UsageError(f"unknown target '{name}'", hint=known)
        return tuple(target for target in self.targets if target in chosen)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


STANDARD_INSTEAD = "TensorRT-RTX is for RTX GPUs: compile with --engine tensorrt, standard TensorRT, on such a machine"
RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    product="TensorRT-RTX",
    extra="rtx",
    oldest=(1, 7),
    cache_update=(1, 7),
    ahead_of_time=True,
    # Ampere, Ada and consumer Blackwell.
    targets=("sm80", "sm86", "sm89", "sm120", "sm121"),
    default_targets=("sm80", "sm86", "sm89", "sm120"),
    tool="tensorrt_rtx",
    issues="https://github.com/NVIDIA/TensorRT-RTX",
    refused={
        "sm75": "Turing, for which TensorRT-RTX has no FP32 or BF16 matrix products, and this graph scales its INT8 "
        "linears in FP32",
        "sm87": f"Jetson Orin; {STANDARD_INSTEAD}",
        "sm90": f"Hopper, such as H100 and H200; {STANDARD_INSTEAD}",
        "sm100": f"data center Blackwell, such as B200; {STANDARD_INSTEAD}",
    },
)
STANDARD = Flavour(
    name="tensorrt",
    module="tensorrt",
    product="TensorRT",
    extra="tensorrt",
    # First version with strong typing and Q/DQ as used here; JetPack 6 ships 10.3.
    oldest=(10, 3),
    # 11 documents opset 24. The parser of 10.15 has TensorScatter as well; untested there, so its caches grow.
    cache_update=(11, 0),
    ahead_of_time=False,
    targets=(),
    default_targets=(),
    tool="trtexec",
    issues="https://github.com/NVIDIA/TensorRT",
)
FLAVOURS = {flavour.name: flavour for flavour in (RTX, STANDARD)}
