"""Quantization schemes: a grammar of names, the deployable precisions, and the settings of the paper's tables.

A name is ``w<bits>a<bits>`` followed by words joined with hyphens: the granularity of activation scales (``static``,
``dynamic`` or ``per-token``), ``asym`` for asymmetric activations, ``g<size>`` for group-wise weights, ``smooth`` for
SmoothQuant. The canonical name omits the granularity of deployable schemes only, so that they cannot be confused with
others: ``w8a8`` and ``w8a8-smooth`` are deployable, and ``w8a8-static-asym`` is not.

A name says how numbers are quantized, not where: the head and the Sites kept in floating point are separate fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from cushion_deploy.core.fakequant import BITS
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.store.digests import digest_json

EMBEDDING_BLOCK = 32
"""Values of a row that share a scale in an INT8 embedding: the block of GGUF's Q8_0, whose codes are kept that way."""
Granularity = Literal["static", "dynamic", "per-token"]
"""Granularities of activation scales: per-tensor static, per-tensor dynamic, per-token dynamic."""
GRANULARITIES: tuple[Granularity, ...] = ("static", "dynamic", "per-token")
_T = TypeVar("_T")


@dataclass(frozen=True)
class QuantScheme:
    """How the inputs and weights of linears are quantized, and which linears.

    The default is the deployable scheme: what TensorRT runs in INT8 (zero point 0 on both operands). Other schemes
    exist only as fake quantization.

    Attributes:
        name: name of the numeric format, in the grammar of :func:`parse_scheme`.
        weight_bits, activation_bits: 8, 6 or 4; weights are always symmetric.
        quantize_head: whether the output head is quantized.
        activations: one constant scale per Site (static), one per window and forward pass (dynamic), or one per token.
        symmetric: True for activations with zero point 0, False for a range from minimum to maximum that includes zero.
        weight_group: number of input features that share a weight scale, within one output channel (the last group may
            be smaller); 0 for one scale per output channel.
        smoothing: whether the scheme is meant for a model with SmoothQuant factors folded in.
        float_sites: Sites whose input and weights stay in floating point.
        int8_embedding: whether the token embedding is stored as INT8 codes with one scale per :data:`EMBEDDING_BLOCK`
            values of a row. A tied head reads the same codes, unless ``quantize_head`` gives it codes of its own.
    """

    name: str = "w8a8"
    weight_bits: int = 8
    activation_bits: int = 8
    quantize_head: bool = True
    activations: Granularity = "static"
    symmetric: bool = True
    weight_group: int = 0
    smoothing: bool = False
    float_sites: tuple[Site, ...] = ()
    int8_embedding: bool = False

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight_bits), ("activation", self.activation_bits)):
            if bits not in BITS:
                raise unknown_choice(f"number of {what} bits", str(bits), [str(b) for b in BITS])
        if self.activations not in GRANULARITIES:
            raise unknown_choice("granularity of activation scales", self.activations, list(GRANULARITIES))
        if self.weight_group < 0:
            raise UsageError(
                f"a weight group has {self.weight_group} input features",
                hint="give a positive size, or 0 for one scale per output channel",
            )

    @property
    def why_not_deployable(self) -> str:
        """Why the engines' INT8 kernels cannot run this scheme; empty for a deployable scheme."""
        reasons = []
        if (self.weight_bits, self.activation_bits) != (8, 8):
            reasons.append(f"{self.weight_bits}-bit weights and {self.activation_bits}-bit activations are not INT8")
        if self.activations != "static":
            reasons.append(f"{GRANULARITY_WORDS[self.activations]} activation scales are not constants of a graph")
        if not self.symmetric:
            reasons.append("asymmetric activations have a zero point other than 0")
        if self.weight_group:
            reasons.append(f"weights have one scale per group of {self.weight_group}, not one per output channel")
        return "; ".join(reasons)

    @property
    def deployable(self) -> bool:
        """Whether the scheme can be exported; other schemes are for evaluation only."""
        return not self.why_not_deployable

    def of(self, sites: Mapping[Site, _T]) -> dict[Site, _T]:
        """Return the quantized ones among a model's Sites (the head is one of them).

        Raises:
            UsageError: one of ``float_sites`` is not a Site of the model.
        """
        unknown = [site for site in self.float_sites if site not in sites]
        if unknown:
            raise unknown_choice("Site to keep in floating point", unknown[0], list(sites))
        left_out = {*self.float_sites, *(() if self.quantize_head else (HEAD_SITE,))}
        return {site: value for site, value in sites.items() if site not in left_out}

    @property
    def digest(self) -> str:
        """SHA-256 of the scheme; independent of the order of ``float_sites``."""
        return digest_json({**asdict(self), "float_sites": sorted(self.float_sites)})


GRANULARITY_WORDS: dict[Granularity, str] = {
    "static": "per-tensor static",
    "dynamic": "per-tensor dynamic",
    "per-token": "per-token dynamic",
}

PRECISIONS: dict[str, QuantScheme] = {"w8a8": QuantScheme()}
"""Deployable precisions by the names that ``--precision`` accepts."""

PAPER_GROUP = 128
"""The paper says group-wise without a size; 128 is the common choice."""
PAPER_ALPHA = 0.8
"""SmoothQuant's migration strength in the paper."""

_PAPER = {
    "o1": (8, "per-token"),
    "o2": (8, "dynamic"),
    "o3": (8, "static"),
    "w6a6": (6, "per-token"),
    "w4a4": (4, "per-token"),
}

PRESETS: dict[str, str] = {
    f"{algorithm}-{setting}": f"w{bits}a{bits}-{granularity}-asym-g{PAPER_GROUP}{suffix}"
    for algorithm, suffix in (("naive", ""), ("smoothquant", "-smooth"))
    for setting, (bits, granularity) in _PAPER.items()
}
"""Settings of the paper's tables and the schemes that they stand for: W8A8 at every granularity in SmoothQuant's
numbering (O1 per-token dynamic, O2 per-tensor dynamic, O3 per-tensor static), W6A6 and W4A4 per token."""

_FORMAT = re.compile(rf"w([{''.join(map(str, BITS))}])a([{''.join(map(str, BITS))}])")
# The hyphen in per-token is not a separator.
_HYPHEN = re.compile(r"-(?!token)")
_GROUP = re.compile(r"g([1-9]\d{0,5})")
_FORMATS = [f"w{w}a{a}" for w in BITS for a in BITS]
_WORDS = [*GRANULARITIES, "asym", "g<size>", "smooth"]


def parse_scheme(name: str, *, quantize_head: bool = True) -> QuantScheme:
    """Return the scheme for the name of a preset or any composition of the grammar, under its canonical name.

    Args:
        name: such as ``w8a8``, ``w4a4-per-token-g128`` or ``naive-o3``; words may come in any order.
        quantize_head: whether the output head is quantized too; names do not express this.

    Raises:
        UsageError: a word is unknown or repeated, or there are two granularities.
    """
    head, hyphen, rest = PRESETS.get(name, name).partition("-")
    numbers = _FORMAT.fullmatch(head)
    if not numbers:
        raise unknown_choice("scheme", name, [*_FORMATS, *PRESETS, f"a format followed by -{', -'.join(_WORDS)}"])
    chosen: dict[str, Any] = {}
    for word in _HYPHEN.split(rest) if hyphen else []:
        field, value = _meaning(word, name)
        if field in chosen:
            raise UsageError(f"scheme '{name}' sets {field} twice", hint=f"remove '{word}' or the other one")
        chosen[field] = value
    scheme = QuantScheme("", int(numbers[1]), int(numbers[2]), quantize_head, **chosen)
    return replace(scheme, name=canonical_name(scheme))


def _meaning(word: str, name: str) -> tuple[str, Any]:
    """Return the field of QuantScheme that a word sets, and its value."""
    if word in GRANULARITIES:
        return "activations", word
    if word == "asym":
        return "symmetric", False
    if word == "smooth":
        return "smoothing", True
    if group := _GROUP.fullmatch(word):
        return "weight_group", int(group[1])
    raise unknown_choice(f"word in scheme '{name}':", word, _WORDS)


def canonical_name(scheme: QuantScheme) -> str:
    """Return the canonical name of a scheme's numeric format, which ignores the head and float Sites."""
    words = [f"w{scheme.weight_bits}a{scheme.activation_bits}"]
    words += [] if scheme.deployable else [scheme.activations]
    words += [] if scheme.symmetric else ["asym"]
    words += [f"g{scheme.weight_group}"] if scheme.weight_group else []
    words += ["smooth"] if scheme.smoothing else []
    return "-".join(words)


def describe(scheme: QuantScheme) -> str:
    """Describe the scheme in a sentence that ends with whether it is deployable and, if not, why."""
    parts = [
        f"{scheme.activation_bits}-bit activations, {GRANULARITY_WORDS[scheme.activations]}, "
        + ("symmetric" if scheme.symmetric else "asymmetric"),
        f"{scheme.weight_bits}-bit weights, symmetric, one scale per "
        + (f"group of {scheme.weight_group}" if scheme.weight_group else "output channel"),
    ]
    parts += ["SmoothQuant"] if scheme.smoothing else []
    parts += [] if scheme.quantize_head else ["head in floating point"]
    parts += ["INT8 embedding"] if scheme.int8_embedding else []
    parts += [f"{len(scheme.float_sites)} Sites in floating point"] if scheme.float_sites else []
    verdict = "deployable" if scheme.deployable else f"evaluation only: {scheme.why_not_deployable}"
    return f"{'; '.join(parts)} ({verdict})"
