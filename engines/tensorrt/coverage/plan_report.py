"""The kernels of a plan: INT8 GEMMs, fused attention, INT8 products whose sum may overflow.

One schema for both sources, the build log (:mod:`.layer_log`) and the engine inspector (:mod:`.inspector`). A linear
whose kernel cannot be identified counts as not INT8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cushion_deploy.core.sites import Site

_FUSION = re.compile(r"__myl_([A-Za-z]+)_0x[0-9a-f]+")
"""Tactic of a fusion: the first four letters of each of its operations, in order."""
_WORD = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset({"Cast", "Conc", "Move", "Resh", "Slic", "Tran"})


@dataclass(frozen=True)
class KernelTensor:
    """An operand or result of a kernel; ``dtype`` as TensorRT spells it, e.g. ``Int8`` or ``Half``."""

    name: str
    dtype: str
    dimensions: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the plan.

    Attributes:
        name: name of the kernel.
        kind: layer type, e.g. ``gemm`` or ``kgen``.
        tactic: name of the implementation; empty if none is listed.
        profile: index of the optimization profile that it serves.
        inputs, constants, outputs: tensors.
        nodes: ONNX nodes that it implements, wholly or in part.
    """

    name: str
    kind: str
    tactic: str
    profile: int
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: tuple[str, ...]

    @property
    def is_gemm(self) -> bool:
        """Whether it is a matrix product, not part of a fusion."""
        return self.kind == "gemm"

    @property
    def operands(self) -> tuple[KernelTensor, ...]:
        """Operands of a matrix product: the first input, and the first constant or second input."""
        return (*self.inputs[:1], *(self.constants or self.inputs[1:])[:1])

    @property
    def is_int8_gemm(self) -> bool:
        """Whether it multiplies INT8 activations by an INT8 weight.

        Fusions of kind ``kgen`` and ``runtime_fusion`` may read INT8 as well, but widen it before they multiply.
        """
        operands = self.operands
        return self.is_gemm and len(operands) == 2 and all(t.dtype == "Int8" for t in operands)

    @property
    def has_half_accumulator(self) -> bool:
        """Whether an INT8 product is written as half.

        The scales of output channels are then applied after the product. What is written is the unscaled sum, which
        overflows half beyond 65504.
        """
        return self.is_int8_gemm and any(t.dtype == "Half" for t in self.outputs)

    @property
    def only_moves(self) -> bool:
        """Whether it only moves data: a copy, a cast, a change of layout."""
        words = _WORD.findall(tactic.group(1)) if (tactic := _FUSION.fullmatch(self.tactic)) else []
        return self.kind == "Reformat" or (bool(words) and _MOVES.issuperset(words))

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is a fused attention: scores, softmax and context in one kernel."""
        return "_mha" in self.tactic or "_mha" in self.name


@dataclass(frozen=True)
class GraphLinear:
    """A matrix product with a constant operand in the parsed network.

    Attributes:
        node: name of the ONNX node.
        site: Site of its input.
        linears: number of linears of the model that are packed into it.
        broken: the Q/DQ rule that prevents INT8; empty if none does.
    """

    node: str
    site: Site
    linears: int
    broken: str = ""


@dataclass(frozen=True)
class Fallback:
    """A linear without an INT8 GEMM in a profile, and the kernels that compute it instead."""

    linear: GraphLinear
    profile: int
    kernels: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The broken Q/DQ rule, or that none is broken."""
        return self.linear.broken or "no Q/DQ rule is broken: the builder chose another kernel"

    def __str__(self) -> str:
        """Return Site, node, profile, reason and kernels in one line."""
        where = ", ".join(self.kernels) or "no kernel names it"
        return f"{self.linear.site} ({self.linear.node}) in profile {self.profile}: {self.reason} ({where})"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"site": self.linear.site, "profile": self.profile, "reason": self.reason, "kernels": list(self.kernels)}


@dataclass(frozen=True)
class PlanReport:
    """Every kernel of a plan, and the number of its optimization profiles."""

    kernels: tuple[Kernel, ...]
    profiles: int

    @property
    def int8_gemms(self) -> tuple[int, ...]:
        """INT8 GEMM kernels of each profile."""
        return self._count(k.profile for k in self.kernels if k.is_int8_gemm)

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels in the profile that has the fewest."""
        return min(self._count(k.profile for k in self.kernels if k.is_fused_attention), default=0)

    @property
    def half_accumulators(self) -> tuple[str, ...]:
        """INT8 products that may overflow, see :attr:`Kernel.has_half_accumulator`."""
        return tuple(k.name for k in self.kernels if k.has_half_accumulator)

    @property
    def moves(self) -> tuple[int, ...]:
        """Kernels of each profile that only copy, cast or reorder."""
        return self._count(k.profile for k in self.kernels if k.only_moves)

    def fallbacks(self, linears: Sequence[GraphLinear]) -> tuple[Fallback, ...]:
        """Return the linears without an INT8 GEMM, one entry per profile that lacks it."""
        found = {(node, k.profile) for k in self.kernels if k.is_int8_gemm for node in k.nodes}
        return tuple(
            Fallback(linear, profile, self._kernels_of(linear.node, profile))
            for linear in linears
            for profile in range(self.profiles)
            if (linear.node, profile) not in found
        )

    def int8_linears(self, linears: Sequence[GraphLinear]) -> int:
        """Return the number of linears, counted before packing, that run in INT8 in every profile."""
        missing = {fallback.linear.node for fallback in self.fallbacks(linears)}
        return sum(linear.linears for linear in linears if linear.node not in missing)

    def unknown_gemms(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Return the GEMM kernels that belong to none of the given nodes."""
        known = frozenset(nodes)
        return tuple(k.name for k in self.kernels if k.is_gemm and known.isdisjoint(k.nodes))

    def _kernels_of(self, node: str, profile: int) -> tuple[str, ...]:
        return tuple(f"{k.kind} {k.name}" for k in self.kernels if k.profile == profile and node in k.nodes)

    def _count(self, profiles: Iterable[int]) -> tuple[int, ...]:
        found = list(profiles)
        return tuple(found.count(profile) for profile in range(self.profiles))
