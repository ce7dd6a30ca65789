"""The tiny model as INT8 and float graphs, and ways to break a graph on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_plans import device
from tiny_llama import hf_folder, ids, session, tiny, tokenizer

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner

__all__ = ["device", "edited", "hf_folder", "ids", "session", "tiny", "tiny_graphs", "tokenizer"]


@pytest.fixture(scope="session")
def tiny_graphs(tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    """Return the graphs ``int8``, ``float head`` and ``float`` of the tiny model behind a prefix."""
    prefix = tiny_model.compute_prefix((7, 1, 100))
    values = {site: float(np.float32(0.02)) for site in tiny_model.sites}
    scales = ActivationScales(values, "max", Lineage(tiny_model.spec.weights_digest, prefix.digest, text="corpus"), 1)
    model, folder = (tiny_model.spec, tiny_model.weights), tmp_path_factory.mktemp("graphs")
    whole = Quantization(prefix, QuantScheme(), scales)
    float_head = Quantization(prefix, QuantScheme(quantize_head=False), scales)
    return {
        "int8": export_graph(*model, whole, GraphForm(), folder, name="int8"),
        "float head": export_graph(*model, float_head, GraphForm(), folder, name="head"),
        "float": export_graph(*model, whole, GraphForm(quantized=False), folder, name="float"),
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
