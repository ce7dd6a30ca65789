"""Scales of an INT8 key/value cache, for keys and for values, per head or per layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array, quantize
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import Estimator
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.store.digests import digest_json

KV_SCALES_FILE = "kv_scales.json"
KvGranularity = Literal["per-head", "per-tensor"]
KvPart = Literal["key", "value"]
KV_GRANULARITIES: tuple[KvGranularity, ...] = get_args(KvGranularity)
KV_PARTS: tuple[KvPart, ...] = get_args(KvPart)


_KINDS: dict[str, type] = {
    **dict.fromkeys(("granularity", "estimator"), str),
    **{"tokens": int, "with_prefix": bool},
}
"""Types of the other entries of a scales file."""


def kv_site(layer: int, part: KvPart) -> Site:
    """Return the Site name of a layer's cached keys or values, e.g. ``layers.3.kv.key``."""
    return Site(f"layers.{layer}.kv.{part}")


@dataclass(frozen=True)
class KvScales:
    """Static symmetric scales of an INT8 cache, and the conditions under which they were calibrated.

    Codes are computed by :func:`~cushion_deploy.core.fakequant.quantize`: int8, zero point 0, half to even.

    Attributes:
        keys: float32 ``[layers, kv_heads]``, for keys after rotation.
        values: float32 ``[layers, kv_heads]``.
        granularity: ``per-tensor`` has one scale for all heads of a layer.
        estimator: the range estimator.
        lineage: digests of the model, prefix, smoothing and calibration text.
        tokens: number of text tokens observed.
        with_prefix: whether the prefix is in the cache and therefore quantized too; the scales then cover it.
    """

    keys: FloatArray
    values: FloatArray
    granularity: KvGranularity
    estimator: Estimator
    lineage: Lineage
    tokens: int
    with_prefix: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in KV_GRANULARITIES:
            raise unknown_choice("granularity of cache scales", str(self.granularity), list(KV_GRANULARITIES))
        hint = "run `cushion-deploy calibrate` again"
        if self.keys.ndim != 2 or self.keys.shape != self.values.shape or 0 in self.keys.shape:
            raise UsageError(
                f"cache scales {self.keys.shape} of keys and {self.values.shape} of values are not two equal "
                "arrays [layers, kv_heads]",
                hint=hint,
            )
        for layer, part, scales in self.rows():
            if not np.isfinite(scales).all() or (scales < np.finfo(np.float32).tiny).any():
                raise UsageError(f"{kv_site(layer, part)}: a scale is not a positive normal number", hint=hint)
            if self.granularity == "per-tensor" and (scales != scales[0]).any():
                raise UsageError(f"{kv_site(layer, part)}: per-tensor scales differ between heads", hint=hint)

    def of(self, layer: int, part: KvPart) -> FloatArray:
        """Return the scale of each head of a layer, float32 ``[kv_heads]``."""
        scales: FloatArray = (self.keys if part == "key" else self.values)[layer]
        return scales

    def rows(self) -> Iterator[tuple[int, KvPart, FloatArray]]:
        """Yield layer, part and the result of :meth:`of`, in the order of computation."""
        for layer in range(len(self.keys)):
            for part in KV_PARTS:
                yield layer, part, self.of(layer, part)

    def codes(self, prefix: Prefix) -> tuple[Int8Array, Int8Array]:
        """Return the codes of a prefix's keys and values, int8 ``[layers, kv_heads, P, head_dim]``."""
        keys, values = (scales[:, :, None, None] for scales in (self.keys, self.values))
        return quantize(prefix.keys, keys), quantize(prefix.values, values)

    @property
    def digest(self) -> str:
        """SHA-256 of the scales and the lineage."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; float32 values are written exactly."""
        data = {**vars(self), "keys": self.keys.tolist(), "values": self.values.tolist(), **self.lineage.to_scales()}
        del data["lineage"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KvScales:
        """Rebuild from :meth:`to_json`."""
        arrays = {name: np.asarray(data[name], dtype=np.float32) for name in ("keys", "values")}
        for name, kind in _KINDS.items():
            if type(data[name]) is not kind:
                raise TypeError(f"{name} is {data[name]!r:.40}, expected {kind.__name__}")
        plain = {key: value for key, value in data.items() if not key.endswith("_digest")}
        return cls(**{**plain, **arrays, "lineage": Lineage.from_scales(data)})
