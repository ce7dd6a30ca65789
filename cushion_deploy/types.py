"""The nouns that stages hand to each other: model, prefix, scales. Standard library and numpy only.

What is exported and compiled stands in ``graphs.py``, what parity says in ``checks.py``. Every artifact records the
digests of its parents, so that a stage can refuse an input that belongs to another model, prefix or scheme.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NewType

import numpy as np
import numpy.typing as npt

from cushion_deploy.errors import UntrustedArtifact, UsageError, unknown_choice

Site = NewType("Site", str)
"""Canonical name of a quantized input: ``layers.<i>.<kind>`` or ``head``."""

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Dtype = Literal["float32", "float16", "bfloat16"]
Estimator = Literal["max", "percentile", "mse"]
PrefixMode = Literal["baked", "cache", "none"]
CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]

ESTIMATORS: tuple[Estimator, ...] = ("max", "percentile", "mse")
BITS = (8, 6, 4)
"""Widths of codes."""
HEAD_SITE = Site("head")
PREFIX_FILE = "prefix.safetensors"
KV_SCALES_FILE = "kv_scales.json"


def layer_site(layer: int, kind: str) -> Site:
    """Return the Site of ``kind`` in a layer; kinds are those of the family's ``SiteRule``."""
    return Site(f"layers.{layer}.{kind}")


def digest_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_arrays(arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    """Return the SHA-256 (hex) of named arrays: name, dtype, shape and bytes, in the given order."""
    h = hashlib.sha256()
    for name, array in arrays:
        h.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        h.update(np.ascontiguousarray(array).data)
    return h.hexdigest()


@dataclass(frozen=True)
class RotaryScaling:
    """Rotary position parameters: base and, per family, the scaling rule (Hugging Face ``rope_parameters``).

    ``partial`` is the share of a head's channels that turns; the first ones do.
    """

    theta: float
    rule: str = "default"
    parameters: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    partial: float = 1.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RotaryScaling:
        """Rebuild from a JSON dict."""
        parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in data["parameters"].items()}
        return cls(**{**data, "parameters": parameters})


@dataclass(frozen=True)
class ModelSpec:
    """What a model is: family, dimensions, vocabulary, and the digest of its weights.

    Attributes that are not plain:
        activation: the function of the MLP, by the name that the graph builder knows.
        rotary: None for a family without rotary positions.
        local_rotary: of the layers with a window, where it differs.
        windows: per layer, how many positions a token may look back, itself included; 0 for all. Empty: 0 everywhere.
        norm_first: whether norms stand before a block; False puts them behind the residual sum.
        attention_scale: what scores are multiplied by.
        score_cap, logit_cap: c of c * tanh(x / c) on attention scores and on logits; 0 for none.
        embedding_size: where it differs from the hidden size; 0 where not.
    """

    family: str
    source: str
    weights_digest: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    rotary: RotaryScaling | None
    tied_head: bool
    parameters: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    attention_scale: float
    revision: str | None = None
    local_rotary: RotaryScaling | None = None
    windows: tuple[int, ...] = ()
    norm_first: bool = True
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_size: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key/value heads",
                hint="the model's config.json is damaged; fetch it again",
            )

    def window(self, layer: int) -> int:
        """Return how far a layer looks back; 0 for everything."""
        return self.windows[layer] if self.windows else 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Rebuild from :meth:`to_json`."""
        d = dict(data)
        for key in ("rotary", "local_rotary"):
            d[key] = RotaryScaling.from_json(d[key]) if d[key] else None
        d["eos_token_ids"], d["windows"] = tuple(d["eos_token_ids"]), tuple(d["windows"])
        return cls(**d)


@dataclass(frozen=True)
class Prefix:
    """A CushionCache: constant keys and values at positions 0..P-1.

    Attributes:
        token_ids: the tokens that produced it; empty for 'no prefix'.
        keys: float32 ``[layers, kv_heads, P, head_dim]``, after rotation.
        values: float32 ``[layers, kv_heads, P, head_dim]``.
        model_digest: weights digest of the model it belongs to.
    """

    token_ids: tuple[int, ...]
    keys: FloatArray
    values: FloatArray
    model_digest: str

    def __post_init__(self) -> None:
        if self.keys.shape != self.values.shape or self.keys.ndim != 4:
            raise UntrustedArtifact(
                f"prefix keys {self.keys.shape} and values {self.values.shape} are not two equal 4-D arrays",
                hint="run `cushion-deploy search` again to make a valid prefix",
            )
        if len(self.token_ids) != self.keys.shape[2]:
            raise UntrustedArtifact(
                f"prefix of {len(self.token_ids)} token ids but {self.keys.shape[2]} positions",
                hint="run `cushion-deploy search` again to make a valid prefix",
            )
        for name, array in (("keys", self.keys), ("values", self.values)):
            if not np.isfinite(array).all():
                raise UntrustedArtifact(
                    f"prefix {name} contain NaN or infinity", hint="run `cushion-deploy search` again"
                )

    @property
    def length(self) -> int:
        """P, the number of positions it occupies."""
        return int(self.keys.shape[2])

    @property
    def digest(self) -> str:
        """SHA-256 over token ids, keys and values."""
        ids = np.asarray(self.token_ids, dtype=np.int64)
        return digest_arrays([("ids", ids), ("keys", self.keys), ("values", self.values)])

    @classmethod
    def empty(cls, spec: ModelSpec) -> Prefix:
        """Return the prefix of length 0 for a model."""
        shape = (spec.num_layers, spec.num_kv_heads, 0, spec.head_dim)
        zero = np.zeros(shape, dtype=np.float32)
        return cls((), zero, zero.copy(), spec.weights_digest)


@dataclass(frozen=True)
class Smoothing:
    """What every input channel of a Site is divided by, and the weights behind it multiplied with (SmoothQuant).

    Attributes:
        factors: Site to float32 ``[features]``, positive; empty for no smoothing.
        alpha: how much of the size moved into the weights, 0 to 1.
        model_digest: weights digest of the model it was measured on.
    """

    factors: Mapping[Site, FloatArray]
    alpha: float
    model_digest: str

    def __post_init__(self) -> None:
        for site, factor in self.factors.items():
            if not np.isfinite(factor).all() or (factor < np.finfo(np.float32).tiny).any():
                raise UntrustedArtifact(
                    f"Site {site}: a smoothing factor is not a positive normal number",
                    hint="run `cushion-deploy calibrate` again",
                )

    @property
    def digest(self) -> str:
        """SHA-256 of what a folded weight depends on; empty for no smoothing."""
        if not self.factors:
            return ""
        return digest_arrays([("model " + self.model_digest, np.zeros(0, np.float32)), *sorted(self.factors.items())])


@dataclass(frozen=True)
class ActivationScales:
    """Static per-tensor activation scales, and what they were calibrated under.

    Attributes:
        scales: Site to scale; a float32 value kept as a Python float.
        estimator: the range estimator.
        model_digest, prefix_digest, corpus_digest: parents.
        tokens: text tokens observed.
        smoothing_digest: of the smoothing that was folded into the model; empty for none.
        zero_points: Site to the code of 0.0, between 0 and 2^bits - 1, for asymmetric codes; empty for symmetric.
        bits: of the codes that the scales are for.
    """

    scales: Mapping[Site, float]
    estimator: Estimator
    model_digest: str
    prefix_digest: str
    corpus_digest: str
    tokens: int
    smoothing_digest: str = ""
    zero_points: Mapping[Site, int] = field(default_factory=dict)
    bits: int = 8

    def __post_init__(self) -> None:
        for site, scale in self.scales.items():
            if not math.isfinite(scale) or scale < float(np.finfo(np.float32).tiny):
                raise UsageError(
                    f"Site {site}: scale {scale!r} is not a positive normal number",
                    hint="look at the calibration text and the model's weights: this input is constant or not finite",
                )
        if self.bits not in BITS:
            raise unknown_choice("number of bits of activation scales", str(self.bits), [str(b) for b in BITS])
        if self.zero_points and set(self.zero_points) != set(self.scales):
            odd = min(set(self.zero_points) ^ set(self.scales))
            raise UsageError(
                f"Site {odd} has only one of scale and zero point", hint="run `cushion-deploy calibrate` again"
            )
        for site, zero in self.zero_points.items():
            if not 0 <= zero < 2**self.bits:
                raise UsageError(
                    f"Site {site}: zero point {zero} is no code of {self.bits} bits",
                    hint="run `cushion-deploy calibrate` again",
                )

    def of(self, sites: Iterable[Site]) -> dict[Site, float]:
        """Return the scales of these Sites; raises UsageError when one is missing."""
        wanted = list(sites)
        missing = [site for site in wanted if site not in self.scales]
        if missing:
            raise UsageError(
                f"no activation scale for Site {missing[0]} ({len(missing)} missing)",
                hint="run `cushion-deploy calibrate` for this model and scheme",
            )
        return {site: self.scales[site] for site in wanted}

    def moved(self, scales: Mapping[Site, float], prefix: Prefix) -> ActivationScales:
        """Return other scales with the same parents behind another prefix, as tuning leaves them."""
        return replace(self, scales=dict(scales), prefix_digest=prefix.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of scales and parents."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; zero points and bits stand in it only where they are not the deployable ones."""
        data = {**asdict(self), "scales": dict(sorted(self.scales.items()))}
        data["zero_points"] = dict(sorted(self.zero_points.items()))
        if not self.zero_points:
            del data["zero_points"]
        if self.bits == 8:
            del data["bits"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActivationScales:
        """Rebuild from :meth:`to_json`."""
        d = dict(data)
        d["scales"] = {Site(k): float(v) for k, v in d["scales"].items()}
        d["zero_points"] = {Site(k): int(v) for k, v in d.get("zero_points", {}).items()}
        return cls(**d)
