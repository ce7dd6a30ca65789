"""The specification of a model: family, dimensions, positions, vocabulary, and the digest of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cushion_deploy.errors import UsageError


@dataclass(frozen=True)
class RotaryScaling:
    """Parameters of rotary positions: base and, per family, the scaling rule (Hugging Face ``rope_parameters``).

    ``partial`` is the fraction of a head's channels that is rotated, counted from the first.
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
    """The specification of a model: family, dimensions, vocabulary, and the digest of its weights.

    Attributes that need an explanation:
        activation: activation function of the MLP, by its name in the graph builder.
        rotary: None for a family without rotary positions.
        local_rotary: for layers with a window, if it differs.
        windows: per layer, the number of positions a token can attend to, itself included; 0 for all. Empty: all 0.
        norm_first: whether norms come before a block; False puts them after the residual sum.
        attention_scale: factor of the attention scores.
        score_cap, logit_cap: c of the soft cap c * tanh(x / c) on attention scores and on logits; 0 for none.
        embedding_size: size of the embedding if it differs from the hidden size; otherwise 0.
        unrotated: layers without rotary positions.
        embedding_factor, residual_factor: of the embedding, and of what a block adds to the residual stream.
        logit_divisor: of the logits, before a soft cap.
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
    unrotated: tuple[int, ...] = ()
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logit_divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key/value heads",
                hint="the model's config.json is damaged; download it again",
            )

    def window(self, layer: int) -> int:
        """Return the window of a layer in positions; 0 for no limit."""
        return self.windows[layer] if self.windows else 0

    @property
    def smallest_window(self) -> int:
        """The smallest window of a layer that has one; 0 if none has."""
        return min((window for window in self.windows if window), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Rebuild from :meth:`to_json`."""
        d = dict(data)
        for key in ("rotary", "local_rotary"):
            d[key] = RotaryScaling.from_json(d[key]) if d[key] else None
        for key in ("eos_token_ids", "windows", "unrotated"):
            d[key] = tuple(d.get(key, ()))
        return cls(**d)
