"""What there is to know about a model family, as data that the torch side and the export side both read."""

from __future__ import annotations

from dataclasses import dataclass

from cushion_deploy.types import HEAD_SITE, ModelSpec, Site, layer_site


@dataclass(frozen=True)
class SiteRule:
    """One quantized input of a layer and the linears that share it, by module path inside the layer.

    ``absorber`` is the norm or linear before the Site whose output channels are the Site's input channels up to
    a factor, so that dividing its tensors along their first axis divides the Site's input; None where nothing
    can absorb a factor.
    """

    kind: str
    linears: tuple[str, ...]
    absorber: str | None = None


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture.

    Attributes:
        name: the name in reports and the key of the table.
        model_types: values of ``model_type`` in config.json that this description covers.
        layers: path of the list of layers.
        embedding, final_norm, head: paths of the modules around the layers.
        attention_norm, mlp_norm: paths inside a layer.
        sites: quantized inputs of a layer in the order of the computation; the exporter reads
            the q, k, v, output, gate, up and down projections from them by position.
        activations: values of ``hidden_act`` that the graph builder knows for this family.
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
    activations: tuple[str, ...]
    rotary_rules: tuple[str, ...]

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
