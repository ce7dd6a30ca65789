"""Assemble the results of search, smoothing, calibration and tuning into the quantization that is exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_cached_scales,
    read_prefix,
    read_scales,
    read_smoothing,
)
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.run import Inputs


@dataclass(frozen=True)
class AssembleQuantization(Derived[Quantization]):
    """The parts of a quantization; parts that do not belong together are rejected.

    Attributes:
        prefix, scheme, scales, smoothing, kv_scales: see :class:`~cushion_deploy.core.quantization.Quantization`.
    """

    prefix: Node[Prefix]
    scheme: Node[QuantScheme]
    scales: Node[ActivationScales] | None
    smoothing: Node[Smoothing] | None = None
    kv_scales: Node[KvScales] | None = None

    def make(self, inputs: Inputs) -> Quantization:
        """Return the quantization; raises UsageError if a part was made for another model, prefix or smoothing."""
        return Quantization(
            inputs.get(self.prefix),
            inputs.get(self.scheme),
            inputs.get(self.scales) if self.scales else None,
            inputs.get(self.smoothing) if self.smoothing else None,
            inputs.get(self.kv_scales) if self.kv_scales else None,
        )


@dataclass(frozen=True)
class WithoutPrefix(Derived[Quantization]):
    """The quantization to compare with: without a prefix, or the same one if the search found none.

    Attributes:
        quantized: the quantization with the prefix.
        bare: the same recipe without a prefix.
    """

    quantized: Node[Quantization]
    bare: Node[Quantization]

    def make(self, inputs: Inputs) -> Quantization:
        """Return the quantization without a prefix."""
        found = inputs.get(self.quantized)
        return inputs.get(self.bare) if found.prefix.length else found


def read_quantization(bundle: Path, graph: ExportedGraph, scheme: QuantScheme) -> Quantization:
    """Return the quantization of a bundle, read from its files.

    Args:
        bundle: the verified folder.
        graph: the bundle's graph; a Site that has a scale but no Q node was kept in floating point.
        scheme: the scheme with every Site quantized.

    Raises:
        UsageError: a file is missing.
        UntrustedArtifact: a file is damaged, or belongs to another bundle.
    """
    scales = read_scales(bundle / SCALES_FILE)
    smoothing = read_smoothing(bundle / SMOOTHING_FILE) if scales.lineage.smoothing else None
    kept = [s for s in scales.scales if s not in graph.sites and (s != HEAD_SITE or scheme.quantize_head)]
    prefix, kv = read_prefix(bundle / PREFIX_FILE), read_cached_scales(graph)
    scheme = replace(scheme, float_sites=tuple(kept), int8_embedding=graph.int8_embedding)
    try:
        return Quantization(prefix, scheme, scales, smoothing, kv)
    except UsageError as e:
        raise UntrustedArtifact(f"in {bundle} {e.message}", hint="build the bundle again") from e
