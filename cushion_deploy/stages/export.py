"""Export: write the ONNX graph of a quantized model in a given form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.engines.base import Engine
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.stages.base import Derived, Node, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

DESCRIPTION = "export.json"


@dataclass(frozen=True)
class Export(Stage[ExportedGraph]):
    """Export one ONNX graph.

    Attributes:
        model: its weights are read from disk, and smoothing factors are folded in during the export.
        quantization: the quantization that the graph implements.
        form: the form of the graph.
    """

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 1
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    form: GraphForm

    @property
    def label(self) -> str:
        """The name; for a form other than that of the bundle's graph, with the differences appended."""
        if not self.form.quantized:
            return f"{self.name}-float-twin"
        return self.name if self.form.dtype == "float32" else f"{self.name}-{self.form.dtype}"

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the graph, its weights and its description."""
        from cushion_deploy.export.write import export_graph

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        with elapsed(inputs.progress, f"exporting the {self.form.dtype} graph"):
            graph = export_graph(model.spec, model.weights, quantization, self.form, out)
        write_json(out / DESCRIPTION, graph.to_json())

    def read(self, folder: Path) -> ExportedGraph:
        """Return the graph."""
        return ExportedGraph.from_json(read_json(folder / DESCRIPTION), folder)

    def room(self, inputs: Inputs) -> int:
        """Return the same estimate as :meth:`disk`."""
        return self.disk(inputs.get(self.model).spec)

    def disk(self, spec: ModelSpec) -> int:
        """Return about two bytes per parameter: INT8 linears plus a float embedding."""
        return spec.parameters * (2 if self.form.quantized else 4)


@dataclass(frozen=True)
class EngineGraph(Derived[ExportedGraph]):
    """The graph that an engine compiles: the bundle's own if its form fits, otherwise one exported for the engine.

    Attributes:
        model, quantization: inputs of the export if another form is needed.
        graph, form: the bundle's graph and its form.
        engine: name of the engine.
        dtype: requested floating-point type of plans.
        context: longest context of the plan in tokens, without the prefix.
    """

    model: Node[TorchRunner]
    quantization: Node[Quantization]
    graph: Node[ExportedGraph]
    form: GraphForm
    engine: str
    dtype: Dtype
    context: int

    def make(self, inputs: Inputs) -> ExportedGraph:
        """Return the graph, exporting it if the bundle's own does not fit."""
        graph = inputs.get(self.graph)
        form = engine_form(self.form, ENGINES[self.engine], self.dtype, self.context, graph.contract)
        if form == self.form:
            return graph
        return inputs.get(Export(self.model, self.quantization, form))


def engine_form(form: GraphForm, engine: Engine, dtype: Dtype, context: int, contract: GraphContract) -> GraphForm:
    """Return the form of the graph that an engine compiles.

    The cache is static if the prefix is in the cache, the cache is in floating point, and the engine updates it in
    place. It is then as long as the context, but not longer than the model's positions.

    Args:
        form: the form of the bundle's graph.
        engine: the engine.
        dtype: requested floating-point type; an engine that does not compile it uses the first type that it supports.
        context: longest context in tokens, without the prefix.
        contract: the contract of the bundle's graph.
    """
    found = replace(form, dtype=dtype if dtype in engine.dtypes else engine.dtypes[0])
    if contract.prefix_slots and engine.in_place_cache and form.cache == "growing":
        capacity = min(context + contract.prefix_length, contract.max_positions)
        return replace(found, cache="static", capacity=capacity)
    return found
