"""Export: write the ONNX graph of a quantized model in a given form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

EXPORT_SECONDS = 2e-8
"""Seconds per parameter."""


@dataclass(frozen=True)
class Export(Stage[ExportedGraph]):
    """Export one ONNX graph.

    Attributes:
        model: its weights are read from disk, and smoothing factors are folded in during the export.
        quantization: the quantization that the graph implements.
        form: the form of the graph.
        in_place_context: longest context in tokens of an engine that updates its cache in place, without the prefix.
            If a prefix is in the cache, the cache is static: as long as that context, but not longer than the model's
            positions. 0 exports ``form`` as it is.
    """

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 4
    runs_model: ClassVar[bool] = False
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    form: GraphForm
    in_place_context: int = 0

    @property
    def label(self) -> str:
        """The name; for a form other than that of the bundle's graph, with the differences appended."""
        if not self.form.quantized:
            return f"{self.name}-float-twin"
        static = self.in_place_context or self.form.cache == "static"
        dtype = [] if self.form.dtype == "float32" else [self.form.dtype]
        return "-".join([self.name, *dtype, *(["static"] if static else [])])

    def final_form(self, prefix: int, max_positions: int) -> GraphForm:
        """Return the form for a prefix of the given length, once it is known."""
        if not self.in_place_context or not prefix:
            return self.form
        return replace(self.form, cache="static", capacity=min(self.in_place_context + prefix, max_positions))

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the graph, its weights and its description."""
        from cushion_deploy.export.write import export_graph

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        # Only the checkpoint is read, and the memory is needed for the graph.
        model.placed.unload()
        with elapsed(inputs.progress, f"exporting the {self.form.dtype} graph"):
            form = self.final_form(quantization.prefix.length, model.spec.max_positions)
            graph = export_graph(model.spec, model.weights, quantization, form, out)
        write_json(out / GRAPH_FILE, graph.to_json())

    def read(self, folder: Path) -> ExportedGraph:
        """Return the graph."""
        return ExportedGraph.from_json(read_json(folder / GRAPH_FILE), folder)

    def room(self, inputs: Inputs) -> int:
        """Return the same estimate as :meth:`disk`."""
        return self.disk(inputs.get(self.model).spec)

    def disk(self, spec: ModelSpec) -> int:
        """Return about two bytes per parameter: INT8 linears plus a float embedding."""
        return spec.parameters * (2 if self.form.quantized else 4)

    def seconds(self, speed: Speed) -> float:
        """Count every parameter, because each is read, quantized and written once."""
        return EXPORT_SECONDS * speed.spec.parameters
