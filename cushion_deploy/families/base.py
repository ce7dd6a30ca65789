"""What there is to know about a model family, as data that the torch side and the export side both read."""

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
"""Names that configurations use for the functions that the graph builder knows."""


@dataclass(frozen=True)
class Absorber:
    """The norm or linear before a Site whose output channels are the Site's input channels up to a factor.

    Dividing its tensors along their first axis divides the Site's input.

    Attributes:
        path: of the module, inside the layer.
        part: which of how many equal parts of its output channels, for linears that are stored as one.
        norm: whether it is a norm; one that stands behind the residual sum is no absorber, because the sum reads it.
    """

    path: str
    part: tuple[int, int] = (0, 1)
    norm: bool = False


@dataclass(frozen=True)
class SiteRule:
    """One quantized input of a layer and the linears that share it, by module path inside the layer.

    ``absorber`` is None where nothing before the Site can absorb a factor.
    """

    kind: str
    linears: tuple[str, ...]
    absorber: Absorber | None = None


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture.

    Attributes:
        name: the name in reports and the key of the table.
        model_types: values of ``model_type`` in config.json that this description covers.
        layers: path of the list of layers.
        embedding, final_norm, head: paths of the modules around the layers; a final norm without tensors is none.
        attention_norm, mlp_norm: paths inside a layer, of the norms before attention and MLP (behind the residual
            sum instead where ``ModelSpec.norm_first`` is False).
        sites: quantized inputs of a layer in the order of the computation: input of q/k/v, of the output
            projection, of gate/up or the first linear of the MLP, and of the last linear of the MLP.
        activation_key: key of the activation function in config.json; None where ``activation`` is built in.
        activation: used where the configuration names none.
        norm_eps_key: key of the norm's epsilon; None for the 1e-5 of torch.
        intermediate_key: key of the MLP's inner size; without a value it is four times the hidden size.
        norm: root mean square, or mean and variance with a bias.
        norm_offset: added to a norm's stored weight.
        attention_post_norm, mlp_post_norm: norms of a block's output before it is added to the residual.
        query_norm, key_norm: norms of each head's query and key, before rotation.
        embedding_norm: path of a norm right behind the embedding.
        embedding_in, embedding_out: paths of linears between embedding size and hidden size, where a model has them.
        scaled_embedding: whether embeddings are multiplied by the square root of the hidden size.
        positions: how a token knows its place.
        position_embedding: path of the table of learned positions.
        position_offset: what is added to a position before it is looked up.
        rotary_rules: scaling rules of rotary positions that the graph builder knows for this family.
        partial_rotary: whether ``partial_rotary_factor`` counts.
        windows: which layers a ``sliding_window`` holds for; ``by_layer`` means those that ``layer_types`` names.
        qkv: how one linear for q, k and v orders its outputs: all of q, then k, then v, or q, k, v head by head.
        gated: whether the MLP multiplies its activation with a second linear.
        needs_bos: whether the model is never run without its ``<bos>``: without it, it says nothing of use. Whatever is
            measured without a prefix then has that token before every text, and a search begins with it.
        transposed: last parts of the paths of linears that are stored ``[in, out]``.
        attention: implementation in transformers that computes the whole function.
        required: values that config.json must have (or leave out) to be covered by this description.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    embedding: str
    final_norm: str
    head: str
    attention_norm: str
    mlp_norm: str
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
        """Return every Site with the paths of the linears it feeds, in the order of the computation."""
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
