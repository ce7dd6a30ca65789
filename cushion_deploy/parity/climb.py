"""Run the parity ladder for a graph: every rung, from the constants in the graph to free runs of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.errors import CushionError
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.ladder import (
    FLOAT_RUNG,
    decode_rung,
    engine_rung,
    float_rung,
    plan_rung,
    segment_decode_rung,
    segment_rung,
)
from cushion_deploy.parity.limits import TIED_HEAD_LOGITS
from cushion_deploy.parity.segments import SegmentRun
from cushion_deploy.parity.stored_values import cache_scale_rung, embedding_rung, scale_rung, weight_rung
from cushion_deploy.parity.torch_results import TorchReference

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
        rung = f"scales in the {name} against scales.json"
        with elapsed(self.progress, rung):
            checks = scale_rung(rung, graph, self.quantization.static_scales)
        yield checks
        if kv:
            rung = f"scales in the {name} against kv_scales.json"
            with elapsed(self.progress, rung):
                checks = cache_scale_rung(rung, graph, kv)
            yield checks
        rung = f"weights in the {name} against fake-quant"
        with elapsed(self.progress, rung):
            checks = weight_rung(rung, graph, linear_codes(self.model, self.quantization.scheme))
        yield checks
        if graph.int8_embedding:
            rung = f"embedding in the {name} against fake-quant"
            with elapsed(self.progress, rung):
                checks = embedding_rung(rung, graph, embedding_codes(self.model))
            yield checks

    def _float_graph(self) -> Iterator[list[ParityCheck]]:
        from cushion_deploy.parity.reference import float_inputs

        ids, prefix = self.reference.ids, self.quantization.prefix
        with elapsed(self.progress, FLOAT_RUNG):
            checks = float_rung(self.reference, self.twin, lambda: float_inputs(self.model, prefix, ids))
        yield checks
        with elapsed(self.progress, "opening the float graph"):
            session = open_session(self.twin, prepack=False)
        yield decode_rung("float graph: decode against prefill", self.reference, session, self.tokens, self.progress)

    def _canonical_graph(self) -> Iterator[list[ParityCheck]]:
        literal = SegmentRun(self.graph, self.quantization.static_scales, "literal")
        rung = "canonical ONNX against fake-quant"
        with elapsed(self.progress, rung):
            checks = segment_rung(rung, self.reference, literal)
        yield checks
        for graph in self.plans:
            yield from self._plan_graph(graph, literal)

    def _plan_graph(self, graph: ExportedGraph, literal: SegmentRun) -> Iterator[list[ParityCheck]]:
        """Climb the rungs of one graph behind plans."""
        plan, name = SegmentRun(graph, self.quantization.static_scales, "literal"), plan_name(graph)
        rung = f"{name} against the float32 graph"
        with elapsed(self.progress, rung):
            checks = plan_rung(rung, self.reference, literal, plan)
        yield checks
        if graph.contract.cache_capacity:
            rung = f"{name}: decode against prefill"
            yield segment_decode_rung(rung, self.reference, plan, self.tokens, progress=self.progress)

    @property
    def _head_reads_embedding(self) -> bool:
        """Whether a head in floating point reads the INT8 codes of the embedding."""
        untied = f"{self.model.family.head}.weight" in self.model.weights.names() and not self.model.spec.tied_head
        return self.graph.int8_embedding and not untied and HEAD_SITE not in self.graph.sites

    def _engine(self) -> Iterator[list[ParityCheck]]:
        fused = SegmentRun(self.graph, self.quantization.static_scales, "fused")
        within = TIED_HEAD_LOGITS if self._head_reads_embedding else None
        rung = "onnxruntime kernels against fake-quant"
        with elapsed(self.progress, rung):
            segments = segment_rung(rung, self.reference, fused, within)
        yield segments
        rung = "onnxruntime kernels: decode against prefill"
        yield segment_decode_rung(rung, self.reference, fused, self.tokens, within, self.progress)
        del fused
        with elapsed(self.progress, "opening the engine"):
            session = open_session(self.graph)
        rung = "onnxruntime engine against fake-quant"
        checks, self.engine = engine_rung(rung, self.reference, session, self.progress, segments)
        yield checks

    def _other_engine(self, name: str, opened: Callable[[], DecoderSession]) -> Iterator[list[ParityCheck]]:
        """Compare an engine with fake-quant, with the limits of ONNX Runtime."""
        try:
            with elapsed(self.progress, f"opening {name}"):
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
