"""The tiny model deployed: a prefix, calibrated scales, its graphs, and what torch says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.parity.reference import torch_reference
from cushion_deploy.parity.torch_results import TorchReference

TOKENS = (7, 1, 100)
Edit = Callable[[dict[str, np.ndarray]], None]


@dataclass(frozen=True)
class Deployed:
    """One model through calibration, export and the torch side of the ladder."""

    model: TorchRunner
    prefix: Prefix
    scales: ActivationScales
    scheme: QuantScheme
    graph: ExportedGraph
    twin: ExportedGraph
    half: ExportedGraph
    brain: ExportedGraph
    reference: TorchReference


@pytest.fixture(scope="session")
def deployed(tiny_model: TorchRunner, plain_ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Return the deployed tiny model."""
    prefix, scheme = tiny_model.compute_prefix(TOKENS), QuantScheme()
    windows = plain_ids[:512].reshape(8, 64)
    histograms = observe_sites(tiny_model, prefix, windows, np.ones_like(windows))
    scales = choose_scales(histograms, RangeEstimator("max"), tiny_model.lineage(prefix, "corpus"), 512)
    folder = tmp_path_factory.mktemp("deployed")
    given = (tiny_model.spec, tiny_model.weights, Quantization(prefix, scheme, scales))
    graph = export_graph(*given, GraphForm(), folder)
    twin = export_graph(*given, GraphForm(quantized=False), folder, name="float")
    half = export_graph(*given, GraphForm(dtype="float16"), folder, name="float16")
    brain = export_graph(*given, GraphForm(dtype="bfloat16"), folder, name="bfloat16")
    ids = plain_ids[None, 500:564]
    reference = torch_reference(tiny_model, Quantization(prefix, scheme, scales), ids, windows[:4])
    return Deployed(tiny_model, prefix, scales, scheme, graph, twin, half, brain, reference)


@pytest.fixture
def sabotaged(tmp_path: Path) -> Callable[[ExportedGraph, Edit], ExportedGraph]:
    """Return a function that edits the tensors of a graph on disk and leaves everything else as it was."""

    def edit_graph(graph: ExportedGraph, edit: Edit) -> ExportedGraph:
        model = onnx.load(graph.path)
        tensors: dict[str, Any] = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
        before = {name: array.copy() for name, array in tensors.items()}
        edit(tensors)
        changed = [name for name in tensors if not np.array_equal(before[name], tensors[name])]
        assert changed, "the sabotage must change something"
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
        path = tmp_path / graph.path.name
        onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=256)
        return dataclasses.replace(graph, path=path)

    return edit_graph
