"""Quantization schemes and their names: a grammar that composes them, and the settings of the paper's tables.

A name is ``w<bits>a<bits>`` and words joined by hyphens: how activation scales are made (``static``, ``dynamic`` or
``per-token``), ``asym`` for asymmetric activations, ``g<size>`` for group-wise weights, ``smooth`` for SmoothQuant.
In its canonical form the granularity is left out of deployable schemes alone, so that nobody takes another for one:
``w8a8`` and ``w8a8-smooth`` are deployable, and ``w8a8-static-asym`` is not.

A name says how numbers are quantized. Where, is said beside it: the head, and Sites kept in floating point.
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

Granularity = Literal["static", "dynamic", "per-token"]
"""Of activation scales: per-tensor static, per-tensor dynamic, per-token dynamic."""
GRANULARITIES: tuple[Granularity, ...] = ("static", "dynamic", "per-token")
_T = TypeVar("_T")


@dataclass(frozen=True)
class QuantScheme:
    """How the inputs and weights of linears are quantized, and which of them.

    The default is the deployable one: what TensorRT runs in INT8 (zero point 0 on both operands). Everything
    else exists as fake-quantization alone.

    Attributes:
        name: of the numeric format in the grammar of :func:`parse_scheme`.
        weight_bits, activation_bits: 8, 6 or 4; weights are symmetric always.
        quantize_head: whether the output head is quantized.
        activations: one constant scale a Site (static), one a window and forward pass (dynamic), one a token.
        symmetric: activations with zero point 0; else a range from minimum to maximum, zero always in it.
        weight_group: input features that share a weight scale, within one output channel (the last group may
            be shorter); 0 for one scale an output channel.
        smoothing: meant for a model that SmoothQuant is folded into.
        float_sites: Sites whose input and weights stay in floating point.
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

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight_bits), ("activation", self.activation_bits)):
            if bits not in BITS:
                raise unknown_choice(f"number of {what} bits", str(bits), [str(b) for b in BITS])
        if self.activations not in GRANULARITIES:
            raise unknown_choice("granularity of activation scales", self.activations, list(GRANULARITIES))
        if self.weight_group < 0:
            raise UsageError(
                f"weight group of {self.weight_group} input features",
                hint="give a positive size, or 0 for one scale per output channel",
            )

    @property
    def why_not_deployable(self) -> str:
        """What the engines' INT8 kernels lack for this scheme, in words; empty for a deployable one."""
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
        """Whether it can be exported; what cannot is for evaluation alone."""
        return not self.why_not_deployable

    def of(self, sites: Mapping[Site, _T]) -> dict[Site, _T]:
        """Return those of a model's Sites (the head among them) that are quantized.

        Raises:
            UsageError: one of ``float_sites`` is no Site of the model.
        """
        unknown = [site for site in self.float_sites if site not in sites]
        if unknown:
            raise unknown_choice("Site to keep in floating point", unknown[0], list(sites))
        left_out = {*self.float_sites, *(() if self.quantize_head else (HEAD_SITE,))}
        return {site: value for site, value in sites.items() if site not in left_out}

    @property
    def digest(self) -> str:
        """SHA-256 of the scheme; the order of ``float_sites`` does not count."""
        return digest_json({**asdict(self), "float_sites": sorted(self.float_sites)})


GRANULARITY_WORDS: dict[Granularity, str] = {
    "static": "per-tensor static",
    "dynamic": "per-tensor dynamic",
    "per-token": "per-token dynamic",
}

PRECISIONS: dict[str, QuantScheme] = {"w8a8": QuantScheme()}
"""Deployable precisions by name, as ``--precision`` takes them."""

PAPER_GROUP = 128
"""The paper says group-wise and no size; 128 is the field's usual one."""
PAPER_ALPHA = 0.8
"""Migration strength of SmoothQuant in the paper."""

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
"""Settings of the paper's tables and the names that they stand for: W8A8 at every granularity as SmoothQuant numbers
them (O1 per-token dynamic, O2 per-tensor dynamic, O3 per-tensor static), W6A6 and W4A4 per token."""

_FORMAT = re.compile(rf"w([{''.join(map(str, BITS))}])a([{''.join(map(str, BITS))}])")
# The hyphen of per-token belongs to the word.
_HYPHEN = re.compile(r"-(?!token)")
_GROUP = re.compile(r"g([1-9]\d{0,5})")
_FORMATS = [f"w{w}a{a}" for w in BITS for a in BITS]
_WORDS = [*GRANULARITIES, "asym", "g<size>", "smooth"]


def parse_scheme(name: str, *, quantize_head: bool = True) -> QuantScheme:
    """Return the scheme of a preset or of any composition of the grammar, under its canonical name.

    Args:
        name: such as ``w8a8``, ``w4a4-per-token-g128`` or ``naive-o3``; words may come in any order.
        quantize_head: whether the output head is quantized too, which no name says.

    Raises:
        UsageError: an unknown word, a word said twice, or two granularities.
    """
    head, hyphen, rest = PRESETS.get(name, name).partition("-")
    numbers = _FORMAT.fullmatch(head)
    if not numbers:
        raise unknown_choice("scheme", name, [*_FORMATS, *PRESETS, f"a format followed by -{', -'.join(_WORDS)}"])
    chosen: dict[str, Any] = {}
    for word in _HYPHEN.split(rest) if hyphen else []:
        field, value = _meaning(word, name)
        if field in chosen:
            raise UsageError(f"scheme '{name}' says twice what {field} is", hint=f"leave '{word}' out, or the other")
        chosen[field] = value
    scheme = QuantScheme("", int(numbers[1]), int(numbers[2]), quantize_head, **chosen)
    return replace(scheme, name=canonical_name(scheme))


def _meaning(word: str, name: str) -> tuple[str, Any]:
    """Return the field of QuantScheme that a word of a name decides, and its value."""
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
    """Return the one name of a scheme's numeric format; head and float Sites have no part in it."""
    words = [f"w{scheme.weight_bits}a{scheme.activation_bits}"]
    words += [] if scheme.deployable else [scheme.activations]
    words += [] if scheme.symmetric else ["asym"]
    words += [f"g{scheme.weight_group}"] if scheme.weight_group else []
    words += ["smooth"] if scheme.smoothing else []
    return "-".join(words)


def describe(scheme: QuantScheme) -> str:
    """Return the scheme in words, ending in whether it can be deployed and, if not, why."""
    parts = [
        f"{scheme.activation_bits}-bit activations, {GRANULARITY_WORDS[scheme.activations]}, "
        + ("symmetric" if scheme.symmetric else "asymmetric"),
        f"{scheme.weight_bits}-bit weights, symmetric, one scale per "
        + (f"group of {scheme.weight_group}" if scheme.weight_group else "output channel"),
    ]
    parts += ["SmoothQuant"] if scheme.smoothing else []
    parts += [] if scheme.quantize_head else ["head in floating point"]
    parts += [f"{len(scheme.float_sites)} Sites in floating point"] if scheme.float_sites else []
    verdict = "deployable" if scheme.deployable else f"evaluation only: {scheme.why_not_deployable}"
    return f"{'; '.join(parts)} ({verdict})"
