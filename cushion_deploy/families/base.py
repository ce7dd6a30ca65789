"""The description of a model family, as data that both the torch code and the exporter read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.sites import HEAD_SITE, Site, layer_site

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Names in configurations of the activation functions that the graph builder supports."""


@dataclass(frozen=True)
class Absorber:
    """The norm or linear before a Site whose output channels are, up to a factor, the Site's input channels.

    Dividing its tensors along the first axis divides the input of the Site.

    Attributes:
        path: path of the module inside the layer.
        part: index and number of equal parts of its output channels, for linears that are stored as one.
        norm: whether the module is a norm. A norm after the residual sum cannot absorb a factor: the sum reads it too.
    """

    path: str
    part: tuple[int, int] = (0, 1)
    norm: bool = False


@dataclass(frozen=True)
class SiteRule:
    """One quantized input of a layer and the linears that share it, by module path inside the layer.

    ``absorber`` is None if no module before the Site can absorb a factor.
    """

    kind: str
    linears: tuple[str, ...]
    absorber: Absorber | None = None


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture.

    Attributes:
        name: the name in reports, and the key in the table of families.
        model_types: values of ``model_type`` in config.json that this description covers.
        layers: path of the list of layers.
        embedding, final_norm, head: paths of the modules around the layers; a final norm without tensors is skipped.
        attention_norm, mlp_norm: paths inside a layer of the norms before attention and MLP (after the residual sum if
            ``ModelSpec.norm_first`` is False); None for none.
        sites: quantized inputs of a layer in the order of computation: input of q/k/v, of the output projection, of
            gate/up or the first linear of the MLP, and of the last linear of the MLP.
        activation_key: key of the activation function in config.json; None if ``activation`` is fixed.
        activation: activation function if the configuration names none.
        norm_eps_key: key of the norm's epsilon; None for the default of torch, 1e-5.
        intermediate_key: key of the MLP's inner size; if it has no value, the size is four times the hidden size.
        norm: RMS norm, or a layer norm with mean, variance and bias.
        norm_offset: constant that is added to a norm's stored weight.
        attention_post_norm, mlp_post_norm: norms of a block's output before it is added to the residual stream.
        query_norm, key_norm: norms of each head's query and key, before rotation.
        norm_of_all_heads: whether those are norms of the queries and keys of all heads together.
        embedding_norm: path of a norm directly after the embedding.
        embedding_in, embedding_out: paths of linears between embedding size and hidden size, if the model has them.
        scaled_embedding: whether embeddings are multiplied by the square root of the hidden size.
        positions: kind of position encoding.
        position_embedding: path of the table of learned positions.
        position_offset: constant that is added to a position before the lookup.
        rotary_rules: scaling rules of rotary positions that the graph builder supports for this family.
        partial_rotary: whether the setting ``partial_rotary_factor`` applies.
        windows: layers that a ``sliding_window`` applies to; ``by_layer`` means those listed in ``layer_types``.
        qkv: order of the outputs of a fused linear: all of q, then k, then v; or q, k, v head by head.
        gated: whether the MLP multiplies its activation by the output of a second linear.
        needs_bos: whether the model only works with ``<bos>`` before the text. Measurements without a prefix then put
            that token before every text, and a search starts with it.
        transposed: last path components of linears that are stored as ``[in, out]``.
        attention: attention implementation in transformers that computes the complete function.
        required: values that config.json must have, or omit, to be covered by this description.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    embedding: str
    final_norm: str
    head: str
    attention_norm: str | None
    mlp_norm: str | None
    sites: tuple[SiteRule, ...]
    activation_key: str | None = "hidden_act"
    activation: Activation = "silu"
    norm_eps_key: str | None = "rms_norm_eps"
    intermediate_key: str | None = "intermediate_size"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_of_all_heads: bool = False
    embedding_norm: str | None = None
    embedding_in: str | None = None
    embedding_out: str | None = None
    scaled_embedding: bool = False
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    position_embedding: str | None = None
    position_offset: int = 0
    rotary_rules: tuple[str, ...] = ()
    partial_rotary: bool = False
    windows: Literal["none", "all", "by_layer"] = "none"
    qkv: Literal["together", "interleaved"] = "together"
    gated: bool = True
    needs_bos: bool = False
    transposed: tuple[str, ...] = ()
    attention: Literal["sdpa", "eager"] = "sdpa"
    required: Mapping[str, Any] = field(default_factory=dict)

    def layer(self, index: int) -> str:
        """Return the path of a layer."""
        return f"{self.layers}.{index}"

    def linears(self, spec: ModelSpec, *, head: bool) -> dict[Site, tuple[str, ...]]:
        """Return every Site with the paths of the linears that it feeds, in the order of computation."""
        found = {
            layer_site(i, rule.kind): tuple(f"{self.layer(i)}.{path}" for path in rule.linears)
            for i in range(spec.num_layers)
            for rule in self.sites
        }
        if head:
            found[HEAD_SITE] = (self.head,)
        return found

    def rule(self, kind: str) -> SiteRule:
        """Return the rule of a Site kind."""
        return next(rule for rule in self.sites if rule.kind == kind)
