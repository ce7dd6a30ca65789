"""The INT8 rules: what the finished graph must look like so that TensorRT and ONNX Runtime run its linears in INT8.

TensorRT rejects some violations and silently runs others in floating point; the ONNX checker finds none of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx_ir as ir

from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.rules.activation_scales import ACTIVATION_SCALES
from cushion_deploy.export.rules.base import Rule
from cushion_deploy.export.rules.both_operands import BOTH_OPERANDS
from cushion_deploy.export.rules.cache_codes import CACHE_CODES
from cushion_deploy.export.rules.embedding_codes import EMBEDDING_CODES
from cushion_deploy.export.rules.float_attention import FLOAT_ATTENTION
from cushion_deploy.export.rules.no_float_twin import NO_FLOAT_TWIN
from cushion_deploy.export.rules.one_consumer import ONE_CONSUMER
from cushion_deploy.export.rules.quantized_graph import QuantizedGraph
from cushion_deploy.export.rules.sites_exactly import SITES_EXACTLY
from cushion_deploy.export.rules.standard_operators import STANDARD_OPERATORS
from cushion_deploy.export.rules.weight_codes import WEIGHT_CODES
from cushion_deploy.export.rules.weight_scales import WEIGHT_SCALES
from cushion_deploy.export.rules.zero_points import ZERO_POINTS

_RULES: tuple[Rule[Any], ...] = (
    STANDARD_OPERATORS,
    SITES_EXACTLY,
    ONE_CONSUMER,
    ZERO_POINTS,
    ACTIVATION_SCALES,
    WEIGHT_CODES,
    WEIGHT_SCALES,
    BOTH_OPERANDS,
    FLOAT_ATTENTION,
    CACHE_CODES,
    NO_FLOAT_TWIN,
    EMBEDDING_CODES,
)
RULES: dict[str, Rule[Any]] = {rule.name: rule for rule in _RULES}
"""Every rule by name, in the order in which violations are reported."""


def check_graph(
    model: ir.Model,
    sites: Collection[Site],
    cache: Collection[Site] = (),
    scale_dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    int8_embedding: bool = False,
) -> dict[str, int]:
    """Check a finished graph against every rule.

    Args:
        model: the graph as it was read back from disk; the weights themselves are not read.
        sites: Sites that must be quantized, no more and no fewer.
        cache: names of the tensors that must enter an INT8 cache, such as ``layers.3.kv.key``; empty for a cache in
            floating point.
        scale_dtype: type that all scales of linears must have.
        int8_embedding: whether the token embedding must be stored as INT8 codes.

    Returns:
        Name of each rule to the number of nodes or tensors that it examined; all rules hold.

    Raises:
        CheckFailed: the message lists every violation with node, finding and remedy.
    """
    graph = QuantizedGraph(model, frozenset(sites), frozenset(cache), scale_dtype, int8_embedding)
    examined: dict[str, int] = {}
    broken: list[str] = []
    for name, rule in RULES.items():
        examined[name], violations = rule.run(graph)
        broken += [f"[{name}] {violation}" for violation in violations]
    if broken:
        raise CheckFailed(
            f"the graph breaks {len(broken)} INT8 rules:\n" + "\n".join(broken),
            hint="the exporter is at fault, or a later edit of the graph; follow the remedy of each violation",
        )
    return examined
