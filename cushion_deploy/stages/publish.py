"""Publish: write all files of a bundle into a folder next to its destination, then rename it once."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from cushion_deploy.core.artifacts import SCALES_FILE, SMOOTHING_FILE, write_prefix, write_scales, write_smoothing
from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.modeling.origin import read_origin
from cushion_deploy.modeling.source import ModelSource
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report, write_report
from cushion_deploy.report.card import CARD_NAME, model_card
from cushion_deploy.runtime.bundle import TEXT_NAME
from cushion_deploy.runtime.genai import GENAI_NAME, genai_config
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.bundle_tokenizer import describe_text, leave_out_bos
from cushion_deploy.stages.compile import CompiledEngine
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store import place, publish, staging_area


@dataclass(frozen=True)
class Publish(Derived[Report]):
    """Publish a bundle atomically: either completely or not at all.

    Attributes:
        recipe: stored in the manifest.
        files, quantization, graph, engines, report: the contents of the bundle.
        source: the original model, whose name and licence the model card repeats.
        output: the folder of the bundle.
    """

    recipe: Recipe
    files: Node[ModelFiles]
    quantization: Node[Quantization]
    graph: Node[ExportedGraph]
    engines: tuple[Node[CompiledEngine], ...]
    report: Node[Report]
    source: ModelSource
    output: Path

    def make(self, inputs: Inputs) -> Report:
        """Write the bundle and return its report."""
        report, graph = inputs.get(self.report), inputs.get(self.graph)
        quantization, files = inputs.get(self.quantization), inputs.get(self.files)
        with staging_area(self.output) as staged:
            # Copied, not linked: onnx rejects external data with a second hard link as a possible attack.
            for file in (*files.paths, *graph.files):
                place(file, staged / file.name, link=False)
            (staged / GRAPH_FILE).write_text(json.dumps(graph.to_json(), indent=1) + "\n")
            # Search, calibration and scoring put the text directly behind the prefix, which replaces <bos>.
            changes = leave_out_bos(staged) if quantization.prefix.length else ""
            text = describe_text(quantization.prefix.length == 0, changes)
            (staged / TEXT_NAME).write_text(text, encoding="utf-8")
            if not graph.contract.prefix_slots:  # other runtimes start with an empty cache, without the prefix
                _write_genai_config(graph, files.spec, staged)
                write_prefix(quantization.prefix, staged / PREFIX_FILE)
            write_scales(quantization.static_scales, staged / SCALES_FILE)
            if quantization.smoothing:
                write_smoothing(quantization.smoothing, staged / SMOOTHING_FILE)
            for engine in self.engines:
                inputs.get(engine).place(staged)
            (staged / "report").mkdir()
            write_report(report, staged / "report")
            card = model_card(report, read_origin(self.source))
            (staged / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")
            lineage = replace(graph.lineage, graph=graph.digest)
            publish(staged, self.output, self.recipe.model_dump(mode="json"), lineage.to_json())
        return report


def _write_genai_config(graph: ExportedGraph, spec: ModelSpec, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = genai_config(graph.contract, config, spec.eos_token_ids, heads=spec.num_heads, hidden_size=spec.hidden_size)
    (folder / GENAI_NAME).write_text(json.dumps(found, indent=1) + "\n")
