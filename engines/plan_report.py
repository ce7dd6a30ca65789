"""Read off the builder's listing of kernels what TensorRT-RTX made of a graph: INT8 GEMMs and fused attention.

The listing is the log message that begins with ``Layers:``. Its format is undocumented, so this reader is pinned to
one version and refuses a line that it does not know; and what it cannot attribute counts as not INT8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cushion_deploy.errors import CheckFailed
from cushion_deploy.types import Site

SUPPORTED_VERSION = "1.7.1"

_TENSOR = re.compile(
    r"\{ Name: (?P<name>[^{}]*?), (?:Location: \w+, )?Dimensions: \[(?P<dimensions>[-\d,]*)\], "
    r"(?:Strides: \[[-\d,]*\], StrideOrder: \[[\d,]*\], )?Datatype: (?P<dtype>\w+), Format: [^{}]* \}"
)
_TENSORS = r"\[(?: \{ [^{}]* \}(?:, \{ [^{}]* \})*)?\]"
_KERNEL = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), "
    rf"Inputs: (?P<inputs>{_TENSORS}), (?:Constants: (?P<constants>{_TENSORS}), )?Outputs: (?P<outputs>{_TENSORS})"
    r"(?P<fields>(?:, \w+: (?:\[[^\]]*\]|[^,\[]*))*), Metadata: (?P<metadata>(?:\x1f?\[ONNX Layer: [^\]]*\])*)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TACTIC = re.compile(r", TacticName: ([^,\[]*)")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_FUSION = re.compile(r"__myl_([A-Za-z]+)_0x[0-9a-f]+")
"""Tactic of a fusion: four letters of every operation in it, in order."""
_WORD = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset({"Cast", "Conc", "Move", "Resh", "Slic", "Tran"})
_GROUP = re.compile(r"_myl(\d+)_\d+$")


@dataclass(frozen=True)
class KernelTensor:
    """An operand or result of a kernel; ``dtype`` as the builder spells it, e.g. ``Int8`` or ``Half``."""

    name: str
    dtype: str
    dimensions: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the plan.

    Attributes:
        name, kind: as listed; ``kind`` is e.g. ``gemm`` or ``kgen``.
        tactic: name of the implementation; empty when none is given.
        profile: index of the optimization profile that it serves.
        inputs, constants, outputs: tensors.
        nodes: ONNX nodes that it was made from, wholly or in part.
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
        """Whether it is a matrix product of its own."""
        return self.kind == "gemm"

    @property
    def is_int8_gemm(self) -> bool:
        """Whether it multiplies INT8 activations by an INT8 weight.

        Fusions of kind ``kgen`` and ``runtime_fusion`` may read INT8 too, but widen it before they multiply.
        """
        operands = [*self.inputs[:1], *self.constants[:1]]
        return self.is_gemm and len(operands) == 2 and all(t.dtype == "Int8" for t in operands)

    @property
    def has_half_accumulator(self) -> bool:
        """Whether an INT8 product is written as half.

        Scales of output channels are applied behind the product then: what is written is the bare sum, which half
        cannot hold beyond 65504.
        """
        return self.is_int8_gemm and any(t.dtype == "Half" for t in self.outputs)

    @property
    def only_moves(self) -> bool:
        """Whether it computes nothing: a copy, a cast, another layout."""
        words = _WORD.findall(tactic.group(1)) if (tactic := _FUSION.fullmatch(self.tactic)) else []
        return bool(words) and _MOVES.issuperset(words)

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is a whole attention: scores, softmax and context in one kernel."""
        return "_mha" in self.tactic


@dataclass(frozen=True)
class GraphLinear:
    """A matrix product with a constant operand, as the parsed network holds it.

    Attributes:
        node: name of the ONNX node.
        site: Site of its input.
        linears: linears of the model that it packs.
    """

    node: str
    site: Site
    linears: int


@dataclass(frozen=True)
class Fallback:
    """A linear that has no INT8 GEMM in some profile, and the kernels that stand in for it."""

    linear: GraphLinear
    profile: int
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        """Name the Site, the node, the profile and the kernels."""
        where = ", ".join(self.kernels) or "no kernel names it"
        return f"{self.linear.site} ({self.linear.node}) in profile {self.profile}: {where}"


@dataclass(frozen=True)
class PlanReport:
    """Every kernel of a plan, and how many optimization profiles they serve."""

    kernels: tuple[Kernel, ...]
    profiles: int

    @property
    def int8_gemms(self) -> tuple[int, ...]:
        """INT8 GEMM kernels of each profile."""
        return self._count(k.profile for k in self.kernels if k.is_int8_gemm)

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels in the profile that has fewest."""
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
        """Return the linears without an INT8 GEMM, one entry for each profile where it is missing."""
        found = {(node, k.profile) for k in self.kernels if k.is_int8_gemm for node in k.nodes}
        return tuple(
            Fallback(linear, profile, self._kernels_of(linear.node, profile))
            for linear in linears
            for profile in range(self.profiles)
            if (linear.node, profile) not in found
        )

    def int8_linears(self, linears: Sequence[GraphLinear]) -> int:
        """Return how many linears of the model, counted before packing, run in INT8 in every profile."""
        missing = {fallback.linear.node for fallback in self.fallbacks(linears)}
        return sum(linear.linears for linear in linears if linear.node not in missing)

    def unknown_gemms(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Return GEMM kernels that belong to none of the given nodes: products that nobody asked for."""
        known = frozenset(nodes)
        return tuple(k.name for k in self.kernels if k.is_gemm and known.isdisjoint(k.nodes))

    def _kernels_of(self, node: str, profile: int) -> tuple[str, ...]:
        return tuple(f"{k.kind} {k.name}" for k in self.kernels if k.profile == profile and node in k.nodes)

    def _count(self, profiles: Iterable[int]) -> tuple[int, ...]:
        found = list(profiles)
        return tuple(found.count(profile) for profile in range(self.profiles))


def read_plan(listing: str, version: str) -> PlanReport:
    """Parse the builder's ``Layers:`` message.

    Args:
        listing: the whole message.
        version: of the library that wrote it, for the error.

    Raises:
        CheckFailed: a line cannot be read, or the sections are not those of the supported version.
    """
    lines = listing.split("\n")
    if lines[0] != "Layers:":
        raise _unreadable(1, lines[0], version)
    end = next((i for i, line in enumerate(lines) if not line), len(lines))
    rows = [_match(number, line, version) for number, line in enumerate(lines[1:end], start=2)]
    profile_of = _profiles_of_groups(rows)
    kernels = tuple(_kernel(row, profile_of, number, version) for number, row in enumerate(rows, start=2))
    return PlanReport(kernels, _num_profiles(lines[end:], end, version))


def _match(number: int, line: str, version: str) -> re.Match[str]:
    found = _KERNEL.fullmatch(line)
    if found is None:
        raise _unreadable(number, line, version)
    return found


def _profiles_of_groups(rows: Sequence[re.Match[str]]) -> Mapping[str, int]:
    """Return the profile of each group of kernels.

    Kernels are numbered in groups, ``_myl<group>_<index>``. Some kernels and tensors of a group carry the words
    ``[profile N]``, those of profile 0 never do.
    """
    found: dict[str, int] = {}
    for row in rows:
        group, profile = _GROUP.search(row["name"]), _PROFILE.search(row.string)
        if group and profile:
            found[group[1]] = max(found.get(group[1], 0), int(profile[1]))
    return found


def _kernel(row: re.Match[str], profile_of: Mapping[str, int], number: int, version: str) -> Kernel:
    group, own = _GROUP.search(row["name"]), _PROFILE.search(row["name"])
    tactic = _TACTIC.search(row["fields"])
    inputs, constants, outputs = (
        _tensors(row[part] or "", number, row.string, version) for part in ("inputs", "constants", "outputs")
    )
    return Kernel(
        name=row["name"],
        kind=row["kind"],
        tactic=tactic[1] if tactic else "",
        profile=profile_of.get(group[1], 0) if group else int(own[1]) if own else 0,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=tuple(_PROFILE.sub("", node) for node in _NODE.findall(row["metadata"])),
    )


def _tensors(text: str, number: int, line: str, version: str) -> tuple[KernelTensor, ...]:
    found = tuple(
        KernelTensor(t["name"], t["dtype"], tuple(int(d) for d in t["dimensions"].split(",") if d))
        for t in _TENSOR.finditer(text)
    )
    if len(found) != text.count("{"):
        raise _unreadable(number, line, version)
    return found


def _num_profiles(lines: Sequence[str], offset: int, version: str) -> int:
    """Return the number of profiles: entries of ``ProfileInfo`` of the first input or output."""
    for number, line in enumerate(lines, start=offset + 1):
        if line.startswith(" Name: "):
            _, separator, entries = line.partition(", ProfileInfo: [")
            if not separator or "{" not in entries:
                raise _unreadable(number, line, version)
            return entries.count("{")
    raise _unreadable(offset + 1, "(no section 'I/O Tensors')", version)


def _unreadable(number: int, line: str, version: str) -> CheckFailed:
    return CheckFailed(
        f"line {number} of the layer listing of TensorRT-RTX {version} cannot be read: {line[:300]!r}",
        hint=f"this reader knows the listing of version {SUPPORTED_VERSION}; "
        f"install it with pip install 'tensorrt-rtx-cu13=={SUPPORTED_VERSION}.*'",
    )
