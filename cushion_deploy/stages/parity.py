"""Parity: compare a graph with the original model, rung by rung, and name the first Site that diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.sites import Site
from cushion_deploy.parity.checks import ParityCheck, ParityReport
from cushion_deploy.recipe import Parity as ParitySettings
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.compile import EngineToRun
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import Cut, evaluation_windows
from cushion_deploy.store import require_space
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.json_files import finite, read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

RESULT = "parity.json"
GREEDY_POSITIONS = 1536
"""Positions that greedy decoding runs: 32 tokens, each with all tokens before it."""
GRAPH_SECONDS = 15e-8
"""Seconds per parameter to export the float twin, and to open and run it and all cut graphs."""


@dataclass(frozen=True)
class EngineScore:
    """Perplexity of an engine with its standard error; None if it is not finite."""

    perplexity: float | None
    stderr: float | None


@dataclass(frozen=True)
class ParityResult:
    """Result of the parity ladder.

    Attributes:
        report: the checks.
        engine_perplexity, engine_stderr: perplexity of ONNX Runtime on the CPU.
        float_bytes: size of the float twin.
        engines: scores of the other engines that ran, by name.
    """

    report: ParityReport
    engine_perplexity: float | None
    engine_stderr: float | None
    float_bytes: int
    engines: Mapping[str, EngineScore] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherGraphs:
    """Graphs that engines were compiled from, apart from the bundle's own, each once."""

    graphs: tuple[ExportedGraph, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the graphs, whatever their order."""
        return digest_json(sorted(graph.digest for graph in self.graphs))


@dataclass(frozen=True)
class GraphsOfPlans(Derived[OtherGraphs]):
    """The graphs behind plans that are not the bundle's own graph.

    Attributes:
        graph: the bundle's graph.
        plans: the graph behind every plan.
    """

    graph: Node[ExportedGraph]
    plans: tuple[Node[ExportedGraph], ...]

    def make(self, inputs: Inputs) -> OtherGraphs:
        """Return those that differ from the bundle's graph."""
        return OtherGraphs(distinct_graphs([inputs.get(plan) for plan in self.plans], inputs.get(self.graph)))


@dataclass(frozen=True)
class Parity(Stage[ParityResult]):
    """Run the parity ladder.

    Attributes:
        model: the model in floating point.
        quantization: the quantization that the graphs were exported from.
        graph: the bundle's graph.
        form: the form of that graph.
        plans: graphs that engines were compiled from; each one that differs from ``graph`` gets its own rung.
        text: the text on which logits and codes are compared.
        evaluation_text: the text on which perplexity is compared.
        parity: the recipe's section of the same name.
        cut: how the text for perplexity is cut into windows.
        runtime: version of ONNX Runtime.
        engines: other engines; each one that runs here gets its own rung.
    """

    name: ClassVar[str] = "parity"
    version: ClassVar[int] = 4
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    graph: Node[ExportedGraph]
    form: GraphForm
    plans: Node[OtherGraphs]
    text: Node[Corpus]
    evaluation_text: Node[Corpus]
    parity: ParitySettings
    cut: Cut
    runtime: str
    engines: tuple[Node[EngineToRun | None], ...] = ()

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write every check; the float twin is deleted afterwards."""
        with TemporaryDirectory(dir=out) as twin:
            found = self.climb(inputs, Path(twin))
        write_json(out / RESULT, found)

    def climb(self, inputs: Inputs, folder: Path) -> dict[str, Any]:
        """Return the result, JSON-ready; the float twin is exported into ``folder``."""
        from cushion_deploy.export.write import export_graph
        from cushion_deploy.parity.climb import Climb
        from cushion_deploy.parity.reference import torch_reference

        original, quantization = inputs.get(self.model), inputs.get(self.quantization)
        model, corpus = original.folded(quantization.smoothing), inputs.get(self.text)
        ids = model.encode(corpus.text)[None, : self.parity.tokens]
        windows = evaluation_windows(model, inputs.get(self.evaluation_text), self.cut, quantization.prefix.length).ids
        reference = torch_reference(original, quantization, ids, windows, inputs.progress)
        # The other rungs need the memory, and the model only to name the Site of a failed check.
        original.placed.unload()
        graph = inputs.get(self.graph)
        plans = inputs.get(self.plans).graphs
        require_space(folder, 4 * model.spec.parameters)
        form = replace(self.form.float_twin, opset=graph.opset)
        with elapsed(inputs.progress, "exporting the float graph"):
            twin = export_graph(original.spec, original.weights, quantization.float_twin, form, folder)
        tokens = min(self.parity.decode_tokens, ids.shape[1] // 2)
        engines = {engine.name: engine.open for engine in map(inputs.get, self.engines) if engine}
        climb = Climb(model, quantization, reference, graph, twin, plans, tokens, inputs.progress, engines)
        checks = tuple(check for rung in climb.rungs() for check in rung)
        unchecked = tuple(f"{name} was not run: {reason}" for name, reason in climb.not_run.items())
        return {
            "parity": ParityReport(checks, corpus.name, int(ids.size), unchecked).to_json(),
            "engines": {
                name: {"perplexity": finite(score.perplexity), "stderr": finite(score.stderr)}
                for name, score in climb.scores.items()
            },
            "engine_perplexity": finite(climb.engine.perplexity) if climb.engine else None,
            "engine_stderr": finite(climb.engine.stderr) if climb.engine else None,
            "float_bytes": twin.size,
        }

    def read(self, folder: Path) -> ParityResult:
        """Return the result."""
        return read_result(read_json(folder / RESULT))

    def disk(self, spec: ModelSpec) -> int:
        """Return four bytes per parameter for the float twin, which exists while the stage runs."""
        return 4 * spec.parameters

    def seconds(self, speed: Speed) -> float:
        """Sum fake-quant and engines on the evaluation text, greedy decoding, and opening and running cut graphs."""
        engines = 1 + len(self.engines)
        texts = self.cut.tokens * (speed.quantized + engines * speed.compared) + 2 * speed.swap
        greedy = engines * GREEDY_POSITIONS * speed.compared
        return texts + greedy + GRAPH_SECONDS * speed.spec.parameters


def read_result(data: dict[str, Any]) -> ParityResult:
    """Rebuild a result from its JSON; a null value stands for one that was not finite."""
    report = data["parity"]
    checks = [
        ParityCheck(
            rung=c["rung"],
            metric=c["metric"],
            value=math.nan if c["value"] is None else c["value"],
            limit=c["limit"],
            direction=c["direction"],
            site=Site(c["site"]) if c["site"] else None,
            note=c["note"],
        )
        for c in report["checks"]
    ]
    found = ParityReport(tuple(checks), report["corpus"], report["tokens"], tuple(report["unchecked"]))
    engines = {name: EngineScore(**score) for name, score in data["engines"].items()}
    return ParityResult(found, data["engine_perplexity"], data["engine_stderr"], data["float_bytes"], engines)


def distinct_graphs(graphs: Sequence[ExportedGraph], graph: ExportedGraph) -> tuple[ExportedGraph, ...]:
    """Return the graphs that differ from ``graph``, without duplicates."""
    return tuple({g.digest: g for g in graphs if g.digest != graph.digest}.values())
