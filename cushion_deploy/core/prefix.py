"""The CushionCache: constant keys and values that precede every text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.store.digests import digest_arrays

PREFIX_FILE = "prefix.safetensors"


@dataclass(frozen=True)
class Prefix:
    """A CushionCache: constant keys and values at positions 0..P-1.

    Attributes:
        token_ids: the tokens that produced it; empty for 'no prefix'.
        keys: float32 ``[layers, kv_heads, P, head_dim]``, after rotation.
        values: float32 ``[layers, kv_heads, P, head_dim]``.
        model_digest: weights digest of the model that the prefix belongs to.
        slides: whether sliding windows move past it, as they do past the first tokens of any text. That is so only for
            the ``<bos>`` of a model that runs without a prefix, as it was trained; a prefix stays in sight.
    """

    token_ids: tuple[int, ...]
    keys: FloatArray
    values: FloatArray
    model_digest: str
    slides: bool = False

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
        """P, the number of positions that the prefix occupies."""
        return int(self.keys.shape[2])

    @property
    def kept(self) -> int:
        """The number of positions that every token sees, whatever the window of a layer."""
        return 0 if self.slides else self.length

    @property
    def lineage(self) -> Lineage:
        """The digest of the model."""
        return Lineage(model=self.model_digest)

    @property
    def digest(self) -> str:
        """SHA-256 over token ids, keys, values and, where it is true, ``slides``."""
        ids = np.asarray(self.token_ids, dtype=np.int64)
        slides = [("slides", np.ones(1, dtype=np.bool_))] if self.slides else []
        return digest_arrays([("ids", ids), ("keys", self.keys), ("values", self.values), *slides])

    @classmethod
    def empty(cls, spec: ModelSpec) -> Prefix:
        """Return the prefix of length 0 for a model."""
        shape = (spec.num_layers, spec.num_kv_heads, 0, spec.head_dim)
        zero = np.zeros(shape, dtype=np.float32)
        return cls((), zero, zero.copy(), spec.weights_digest)
