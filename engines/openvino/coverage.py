"""Count the linears that OpenVINO runs in INT8, from its runtime model: the precision of every FullyConnected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cushion_deploy.core.sites import Site

_CODES = ".weight_codes"
_INTEGER = ("i8", "u8")
_PASSED = ("Transpose", "Reorder", "Reshape", "Convert")
"""Layers between a constant weight and the product that reads it."""
_LINEAR, _ATTENTION = "FullyConnected", "ScaledDotProductAttention"


@dataclass
class Coverage:
    """What the runtime model runs in INT8.

    Attributes:
        int8: Sites whose FullyConnected runs in INT8, on integer activations.
        left: Sites without such a layer, each with the reason.
        layers: layers of the runtime model by type and precision, counted.
    """

    int8: set[Site] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    layers: Counter[str] = field(default_factory=Counter)

    @property
    def fused_attention(self) -> int:
        """Fused attention layers."""
        return sum(count for layer, count in self.layers.items() if layer.startswith(_ATTENTION))


def read_coverage(compiled: Any, sites: Iterable[Site]) -> Coverage:
    """Count what runs in INT8 in an ``openvino.CompiledModel``.

    Args:
        compiled: compiled from a graph, not imported from a blob.
        sites: Sites that are expected in INT8; none in a float graph.
    """
    found = Coverage()
    reasons: dict[Site, str] = {}
    for layer in compiled.get_runtime_model().get_ops():
        kind, precision = _info(layer, "layerType"), _info(layer, "runtimePrecision")
        if kind in ("Const", "Input", "Output"):
            continue
        found.layers[f"{kind} {precision}"] += 1
        if kind != _LINEAR or not (name := _weight_of(layer)).endswith(_CODES):
            continue
        site = Site(name.removesuffix(_CODES))
        activation = layer.input(0).get_element_type().get_type_name()
        if precision in _INTEGER and activation in _INTEGER:
            found.int8.add(site)
        else:
            reasons[site] = f"{_LINEAR} in {precision} on {activation} activations"
    wanted = set(sites)
    found.int8 &= wanted
    found.left = [f"{site}: {reasons.get(site, f'no {_LINEAR}')}" for site in sorted(wanted - found.int8)]
    return found


def _weight_of(layer: Any) -> str:
    """Return the name of the initializer that a layer multiplies by; empty if it is no constant."""
    node = layer.input(1).get_source_output().get_node()
    while _info(node, "layerType") in _PASSED:
        node = node.input(0).get_source_output().get_node()
    return _info(node, "originalLayersNames") if _info(node, "layerType") == "Const" else ""


def _info(node: Any, name: str) -> str:
    return str(node.get_rt_info()[name].value)
