"""Export: the ONNX graph of a quantization, in the form that is asked for."""

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
    """Write a graph.

    Attributes:
        model: its weights are read from disk, with the smoothing folded in on the way.
        quantization: what is written into it.
        form: what it looks like.
    """

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 1
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    form: GraphForm

    @property
    def label(self) -> str:
        """The name, with what sets the form apart from that of a bundle's graph."""
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
        """As much as :meth:`disk` says."""
        return self.disk(inputs.get(self.model).spec)

    def disk(self, spec: ModelSpec) -> int:
        """INT8 linears beside a float embedding take about two bytes a parameter."""
        return spec.parameters * (2 if self.form.quantized else 4)


@dataclass(frozen=True)
class EngineGraph(Derived[ExportedGraph]):
    """The graph that an engine compiles: the bundle's own where that serves, or one of another form.

    Attributes:
        model, quantization: what a graph of another form is exported from.
        graph, form: the bundle's graph, and what it looks like.
        engine: name of the engine.
        dtype: floating-point type that is wanted of plans.
        context: longest context of the plan, without the prefix.
    """

    model: Node[TorchRunner]
    quantization: Node[Quantization]
    graph: Node[ExportedGraph]
    form: GraphForm
    engine: str
    dtype: Dtype
    context: int

    def make(self, inputs: Inputs) -> ExportedGraph:
        """Return it, exported where it is not the bundle's own."""
        graph = inputs.get(self.graph)
        form = engine_form(self.form, ENGINES[self.engine], self.dtype, self.context, graph.contract)
        if form == self.form:
            return graph
        return inputs.get(Export(self.model, self.quantization, form))


def engine_form(form: GraphForm, engine: Engine, dtype: Dtype, context: int, contract: GraphContract) -> GraphForm:
    """Return the form of the graph that an engine compiles.

    Where the prefix is in the cache, the cache is in floating point, and the engine updates it in place, it is static:
    as long as the context and the model's positions allow.

    Args:
        form: of the bundle's graph.
        engine: the engine.
        dtype: floating-point type that is wanted; an engine that does not compile it gets its own first one.
        context: longest context, without the prefix.
        contract: of the bundle's graph.
    """
    found = replace(form, dtype=dtype if dtype in engine.dtypes else engine.dtypes[0])
    if contract.prefix_slots and engine.in_place_cache and form.cache == "growing":
        capacity = min(context + contract.prefix_length, contract.max_positions)
        return replace(found, cache="static", capacity=capacity)
    return found
