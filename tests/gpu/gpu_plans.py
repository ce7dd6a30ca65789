"""What tests for a GPU share: graphs with constant scales, plans for the device, how far logits lie apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner

IDS = np.random.default_rng(0).integers(5, 300, (1, 48))
CONTEXT = 200


@dataclass(frozen=True)
class Device:
    """The first GPU, with one flavour of TensorRT on it; ``target`` is its compute capability, e.g. ``sm86``."""

    flavour: Flavour
    target: str

    def compile(self, graph: ExportedGraph, folder: Path) -> EngineArtifact:
        """Compile a graph for the device into a new folder."""
        folder.mkdir()
        options = CompileOptions((self.target,), max_batch=2, max_context=CONTEXT, max_prefill=128)
        return ENGINES[self.flavour.name].compile(graph, folder, options)

    def open_plan(self, graph: ExportedGraph, folder: Path) -> TensorRtSession:
        """Compile a graph for the device and open the plan; what its cache begins with lies beside the graph."""
        artifact = self.compile(graph, folder)
        return TensorRt(self.flavour).open(graph, (folder / artifact.files[0]).read_bytes())


def graph_of(
    model: TorchRunner, prefix: Prefix, folder: Path, dtype: Any, /, *, kv: KvScales | None = None, **form: Any
) -> ExportedGraph:
    """Export a model with constant scales: what a plan computes does not depend on how good they are."""
    digest, sites = model.spec.weights_digest, dict.fromkeys(model.sites, 0.05)
    scales = ActivationScales(sites, "max", Lineage(digest, prefix.digest, text="none"), tokens=1)
    folder.mkdir()
    quantization = Quantization(prefix, QuantScheme(quantize_head=True), scales, kv_scales=kv)
    return export_graph(model.spec, model.weights, quantization, GraphForm(dtype=dtype, **form), folder)


def apart(found: Any, expected: Any) -> float:
    """Return how far the logits of the median token are apart, as a share of their size (root mean square).

    The median, because in a free run a single token may fall on the other side of many ties at once.
    """
    distance, size = ((x**2).mean(axis=-1) ** 0.5 for x in (found - expected, expected))
    return float(np.median(distance / size))
