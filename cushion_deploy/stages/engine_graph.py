"""Engine graph: the graph that an engine compiles, the bundle's wherever an export would write the same again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cushion_deploy.core.dtypes import Dtype, PlanDtype
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.value_range import PlanType
from cushion_deploy.engines.base import Engine
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.export import Export
from cushion_deploy.stages.run import Inputs


@dataclass(frozen=True)
class EngineGraph(Derived[ExportedGraph]):
    """The graph that an engine compiles.

    Attributes:
        graph: the bundle's graph.
        form: its form.
        export: the same quantization in the form that the engine wants.
        plan_type: the type of plans, if the graph has it; None for the type of ``export``.
        dtypes: types that the engine compiles; where the type of plans is not among them, the graph is float32.
    """

    graph: Node[ExportedGraph]
    form: GraphForm
    export: Export
    plan_type: Node[PlanType] | None
    dtypes: tuple[Dtype, ...]

    def make(self, inputs: Inputs) -> ExportedGraph:
        """Return the bundle's graph if it is the one, or export the graph in the type that was chosen."""
        return inputs.get(self.choice(inputs))

    def choice(self, inputs: Inputs) -> Node[ExportedGraph]:
        """Return the node of the graph: that of the bundle's, or an export in the type that was chosen."""
        export = self.export
        if self.plan_type:
            chosen = inputs.get(self.plan_type).dtype
            dtype: Dtype = chosen if chosen in self.dtypes else "float32"
            export = replace(export, form=replace(export.form, dtype=dtype))
        if export.form.dtype == self.form.dtype and is_same_graph(  # the bundle's graph is not needed otherwise
            inputs.get(self.graph), self.form, export.form, export.in_place_context
        ):
            return self.graph
        return export


def engine_form(form: GraphForm, engine: Engine, dtype: PlanDtype, context: int) -> tuple[GraphForm, int]:
    """Return the form of the graph that an engine compiles, and its ``in_place_context``; see :class:`Export`.

    Args:
        form: the form of the bundle's graph.
        engine: the engine.
        dtype: requested floating-point type; an engine that does not compile it uses the first type that it supports,
            and so it does for ``auto``.
        context: longest context in tokens, without the prefix.
    """
    in_place = engine.in_place_cache and form.prefix == "cache" and form.cache == "growing"
    found: Dtype = next((known for known in engine.dtypes if known == dtype), engine.dtypes[0])
    gathers_codes = form.gathers_codes and engine.gathers_codes
    return replace(form, dtype=found, gathers_codes=gathers_codes), context if in_place else 0


def is_same_graph(graph: ExportedGraph, form: GraphForm, wanted: GraphForm, in_place_context: int) -> bool:
    """Return whether an export would write a graph again.

    Args:
        graph: the graph.
        form: its form.
        wanted: the form of the export.
        in_place_context: of the export; a static cache holds a prefix, so without one the cache grows.
    """
    if not graph.int8_embedding:  # nothing was stored as codes, so it does not matter who reads them
        form, wanted = (replace(each, gathers_codes=False) for each in (form, wanted))
    return form == wanted and not (in_place_context and graph.contract.prefix_slots)
