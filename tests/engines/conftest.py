"""The tiny model as INT8 and float graphs, and ways to break a graph on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.folder import export_graph
from cushion_deploy.modeling.runner import TorchRunner


@pytest.fixture(scope="session")
def tiny_graphs(tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    """Return the graphs ``int8``, ``float head`` and ``float`` of the tiny model behind a prefix."""
    prefix = tiny_model.compute_prefix((7, 1, 100))
    values = {site: float(np.float32(0.02)) for site in tiny_model.sites}
    scales = ActivationScales(values, "max", Lineage(tiny_model.spec.weights_digest, prefix.digest, text="corpus"), 1)
    parents = (tiny_model.spec, tiny_model.weights, prefix)
    folder = tmp_path_factory.mktemp("graphs")
    return {
        "int8": export_graph(*parents, scales, QuantScheme(), folder, name="int8"),
        "float head": export_graph(*parents, scales, QuantScheme(quantize_head=False), folder, name="head"),
        "float": export_graph(*parents, None, QuantScheme(), folder, name="float"),
    }


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[ExportedGraph, Callable[[onnx.ModelProto], None]], ExportedGraph]:
    """Return a function that writes an edited copy of a graph and describes it as the original."""

    def edit_graph(graph: ExportedGraph, edit: Callable[[onnx.ModelProto], None]) -> ExportedGraph:
        model = onnx.load(graph.path)
        edit(model)
        path = tmp_path / "edited.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=256)
        return dataclasses.replace(graph, path=path)

    return edit_graph
