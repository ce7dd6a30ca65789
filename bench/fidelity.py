"""Measure how close static W8A8 comes to the original model, remedy by remedy, beside the best dynamic scheme.

    python bench/fidelity.py --model MODEL --eval-data TEXT [--eval-data TEXT] [--tune]

Every row has smoothing and scales of its own. The KL divergence from the original model, in nats per token, is the mean
from position 16 of each window on, with its standard error. Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple, replace
from itertools import pairwise
from typing import Any

import numpy as np
from common import arguments, new_run, pipeline

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import PAPER_ALPHA, parse_scheme
from cushion_deploy.evaluate.perplexity import cut_windows
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Fidelity, Teacher
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.scores import scores_of
from cushion_deploy.study.cells import UNROTATED


def main() -> None:
    """Print the comparison."""
    parser = arguments(__doc__)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens to score of each text")
    parser.add_argument("--tune", action="store_true", help="also behind a tuned prefix")
    options = parser.parse_args()
    run, nodes = new_run(options), pipeline(options)
    bench = Fidelities(run, nodes, options.eval_data, options.window, options.max_tokens)
    searched, bare = Given(run.get(nodes.prefix)), nodes.no_prefix
    found = Given(bench.model.compute_prefix(searched.artifact.token_ids))
    prefixes = {"no prefix": bare, "prefix": searched}
    bench.with_context("FP, one more token of context")
    if found.artifact.digest != searched.artifact.digest:
        bench.floating("FP, tokens found", found.artifact)
        prefixes = {"no prefix": bare, "tokens found": found, "prefix": searched}
    bench.floating("FP, prefix", searched.artifact)
    bench.dynamic("per-token dynamic, no prefix (SmoothQuant-O1)", bare)
    for name, prefix in prefixes.items():
        bench.static(f"static, {name}, no rotation", nodes.altered(UNROTATED), prefix)
        bench.static(f"static, {name}, rotated", nodes, prefix)
    if options.tune:
        tuned = nodes.altered({"tuning.enabled": True}).behind(searched)
        bench.floating("FP, tuned prefix", run.get(tuned.quantization).prefix)
        bench.static("static, tuned prefix, rotated", nodes, Given(run.get(tuned.quantization).prefix))
    print(json.dumps({"prefix": searched.artifact.token_ids, "rows": bench.rows}, indent=1))


class Fidelities:
    """Rows of scores of one model on several texts."""

    def __init__(self, run: Run, nodes: Pipeline, texts: list[str], window: int, most: int) -> None:
        """Run the original model on every text."""
        self.run, self.nodes, self.rows = run, nodes, dict[str, Any]()
        self.model: TorchRunner = run.get(nodes.model)
        self.teacher, self.windows = Teacher(self.model), {}
        for data in texts:
            corpus = run.get(nodes.corpus(data, "evaluation"))
            self.windows[corpus.name] = cut_windows(self.model.encode(corpus.text), window, most, corpus.name).ids
            self.teacher.remember(self.windows[corpus.name], run.progress)
        self._add("FP", self.model, run.get(nodes.no_prefix))

    def floating(self, name: str, prefix: Prefix) -> None:
        """Add the float model behind a prefix."""
        self._add(name, self.model, prefix)

    def with_context(self, name: str) -> None:
        """Add the float model on windows behind the one token that precedes each of them in the text.

        This is how far the original model is from itself if a window begins one token earlier. The first window of a
        text has nothing before it and is left out.
        """
        self.rows[name] = {}
        for text, windows in self.windows.items():
            runs = []
            if len(windows) < 2:
                continue
            for before, window in pairwise(windows):
                context = self.model.compute_prefix((*self.model.bare_tokens, int(before[-1])))
                # It is text: sliding windows move past it.
                runs.append(self.teacher.compare(self.model, replace(context, slides=True), window[None]))
            losses, divergences = (np.concatenate(part) for part in zip(*map(astuple, runs), strict=True))
            self._show(name, text, Fidelity(losses, divergences))

    def static(self, name: str, nodes: Pipeline, prefix: Node[Prefix]) -> None:
        """Add the scheme of a recipe behind a prefix, with everything that is measured behind it."""
        quantization = self.run.get(nodes.behind(prefix, tuned=False).quantization)
        folded = self.model.folded(quantization.smoothing)
        with simulated(folded, quantization.scheme, quantization.scales):
            self._add(name, folded, quantization.prefix)

    def dynamic(self, name: str, prefix: Node[Prefix]) -> None:
        """Add the paper's per-token dynamic W8A8 with SmoothQuant, the head in floating point as in static rows."""
        paper = {**UNROTATED, "smoothing.alpha": PAPER_ALPHA, "smoothing.limit": None}
        smoothing = self.nodes.altered(paper).smoothing(prefix)
        folded = self.model.folded(self.run.get(smoothing) if smoothing else None)
        with simulated(folded, parse_scheme("smoothquant-o1", quantize_head=False), None):
            self._add(name, folded, self.run.get(prefix))

    def _add(self, name: str, model: TorchRunner, prefix: Prefix) -> None:
        self.rows[name] = {}
        for text, windows in self.windows.items():
            self._show(name, text, self.teacher.compare(model, prefix, windows, self.run.progress, f"{name}: {text}"))

    def _show(self, name: str, text: str, fidelity: Fidelity) -> None:
        self.rows[name][text] = found = scores_of(fidelity)
        kl, stderr = found["kl_after_16"], found["kl_after_16_stderr"]
        print(f"{name:48} {text:24} {found['perplexity']:8.3f} KL {kl:.4f} ± {stderr:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
