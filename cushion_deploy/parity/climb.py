"""Run the parity ladder for a graph: every rung, from the constants in the graph to free runs of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.errors import CushionError
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.ladder import (
    TIED_HEAD_LOGITS,
    TorchReference,
    decode_rung,
    engine_rung,
    float_rung,
    plan_rung,
    segment_decode_rung,
    segment_rung,
)
from cushion_deploy.parity.segments import SegmentRun
from cushion_deploy.parity.stored_values import cache_scale_rung, embedding_rung, scale_rung, weight_rung

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner


@dataclass
class Climb:
    """One run of the parity ladder.

    Attributes:
        model: the model with the smoothing factors folded in.
        quantization: the quantization that the graphs were exported from.
        reference: the result of torch on the parity text.
        graph: the bundle's graph.
        twin: the same graph in floating point.
        plans: other graphs that engines were compiled from.
        tokens: number of tokens to decode one by one.
        progress: receives progress.
        engines: opens a session of each other engine, by name; what it raises as CushionError is why it did not run.
        engine: the losses of ONNX Runtime on the windows of the reference, set when :meth:`rungs` ends.
        scores: those of the other engines that ran, by name.
        not_run: why the others did not, by name.
    """

    model: TorchRunner
    quantization: Quantization
    reference: TorchReference
    graph: ExportedGraph
    twin: ExportedGraph
    plans: tuple[ExportedGraph, ...]
    tokens: int
    progress: Progress = silent
    engines: Mapping[str, Callable[[], DecoderSession]] = field(default_factory=dict)
    engine: TextScore | None = None
    scores: dict[str, TextScore] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def rungs(self) -> Iterator[list[ParityCheck]]:
        """Yield the checks of every rung, in order."""
        for graph in (self.graph, *self.plans):
            yield from self._constants(graph)
        yield from self._float_graph()
        yield from self._canonical_graph()
        yield from self._engine()
        for name, opened in self.engines.items():
            yield from self._other_engine(name, opened)

    def _constants(self, graph: ExportedGraph) -> Iterator[list[ParityCheck]]:
        from cushion_deploy.parity.reference import embedding_codes, linear_codes

        name, kv = "graph" if graph is self.graph else plan_name(graph), self.quantization.kv_scales
        yield scale_rung(f"scales in the {name} against scales.json", graph, self.quantization.static_scales)
        if kv:
            yield cache_scale_rung(f"scales in the {name} against kv_scales.json", graph, kv)
        codes = linear_codes(self.model, self.quantization.scheme)
        yield weight_rung(f"weights in the {name} against fake-quant", graph, codes)
        if graph.int8_embedding:
            rung = f"embedding in the {name} against fake-quant"
            yield embedding_rung(rung, graph, embedding_codes(self.model))

    def _float_graph(self) -> Iterator[list[ParityCheck]]:
        from cushion_deploy.parity.reference import float_inputs

        ids, prefix = self.reference.ids, self.quantization.prefix
        yield float_rung(self.reference, self.twin, lambda: float_inputs(self.model, prefix, ids))
        yield decode_rung(
            "float graph: decode against prefill", ids, open_session(self.twin, prepack=False), self.tokens
        )

    def _canonical_graph(self) -> Iterator[list[ParityCheck]]:
        literal = SegmentRun(self.graph, self.quantization.static_scales, "literal")
        yield segment_rung("canonical ONNX against fake-quant", self.reference, literal)
        for graph in self.plans:
            yield from self._plan_graph(graph, literal)

    def _plan_graph(self, graph: ExportedGraph, literal: SegmentRun) -> Iterator[list[ParityCheck]]:
        """Climb the rungs of one graph behind plans."""
        plan, name = SegmentRun(graph, self.quantization.static_scales, "literal"), plan_name(graph)
        yield plan_rung(f"{name} against the float32 graph", self.reference, literal, plan)
        if graph.contract.cache_capacity:
            rung = f"{name}: decode against prefill"
            yield segment_decode_rung(rung, self.reference, plan, self.tokens)

    @property
    def _head_reads_embedding(self) -> bool:
        """Whether a head in floating point reads the INT8 codes of the embedding."""
        untied = f"{self.model.family.head}.weight" in self.model.weights.names() and not self.model.spec.tied_head
        return self.graph.int8_embedding and not untied and HEAD_SITE not in self.graph.sites

    def _engine(self) -> Iterator[list[ParityCheck]]:
        fused = SegmentRun(self.graph, self.quantization.static_scales, "fused")
        within = TIED_HEAD_LOGITS if self._head_reads_embedding else None
        segments = segment_rung("onnxruntime kernels against fake-quant", self.reference, fused, within)
        yield segments
        rung = "onnxruntime kernels: decode against prefill"
        yield segment_decode_rung(rung, self.reference, fused, self.tokens, within)
        del fused
        session = open_session(self.graph)
        rung = "onnxruntime engine against fake-quant"
        checks, self.engine = engine_rung(rung, self.reference, session, self.progress, segments)
        yield checks

    def _other_engine(self, name: str, opened: Callable[[], DecoderSession]) -> Iterator[list[ParityCheck]]:
        """Compare an engine with fake-quant, with the limits of ONNX Runtime."""
        try:
            session = opened()
            try:
                rung = f"{name} engine against fake-quant"
                checks, self.scores[name] = engine_rung(rung, self.reference, session, self.progress)
            finally:
                session.close()
        except CushionError as e:
            self.not_run[name] = e.message
            return
        yield checks


def plan_name(graph: ExportedGraph) -> str:
    """Return the name of the graph behind a plan: its type, and whether its cache is static."""
    return f"{graph.contract.dtype} graph" + (" with a static cache" if graph.contract.cache_capacity else "")
