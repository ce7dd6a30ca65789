"""The cells of a study: each one measurement, a stage of the work folder, so that a killed study goes on behind it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion_deploy.core.artifacts import SCALES_FILE, read_scales, write_scales
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import PAPER_ALPHA, QuantScheme, parse_scheme
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.evaluate.perplexity import TextScore, cut_windows
from cushion_deploy.pipeline.calibrating import calibration_parents, calibration_windows, smooth
from cushion_deploy.pipeline.files import read_json, write_json
from cushion_deploy.pipeline.limits import require_positions
from cushion_deploy.pipeline.prepare import Deployed, prepare
from cushion_deploy.pipeline.stages import no_prefix, search_prefix
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.prefix.trace import SearchTrace
from cushion_deploy.study.document import Cell, Score

if TYPE_CHECKING:
    from cushion_deploy.modeling.teacher import Teacher

BLOCK_WINDOWS = 10
"""Windows that Table 5 is averaged over, as in the paper."""
ATTENTION_TOKENS = 128
"""Length of the text of Figure 3: weights of every pair of tokens, head and layer are held at once."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        prefix: stands before every text.
        scheme: what is quantized; None for floating point.
        smoothing: folded into the weights.
        scales: of a static scheme.
    """

    prefix: Prefix
    scheme: QuantScheme | None = None
    smoothing: Smoothing | None = None
    scales: ActivationScales | None = None

    @property
    def parents(self) -> dict[str, Any]:
        """What decides its numbers beside model and text."""
        return {
            "prefix": self.prefix.digest,
            "scheme": self.scheme.digest if self.scheme else None,
            "smoothing": self.smoothing.digest if self.smoothing else "",
            "scales": self.scales.digest if self.scales else None,
        }


@dataclass
class Cells:
    """The measurements of one study.

    Attributes:
        ws: the run; its recipe says what is deployed, and how texts are cut.
        texts: what :meth:`Workspace.corpus` takes; the first also serves Table 5 and both figures.
        done: folder to cell, in order of first use.
    """

    ws: Workspace
    texts: Sequence[str | None]
    done: dict[str, Cell] = field(default_factory=dict)
    _teachers: dict[str, tuple[IntArray, Teacher]] = field(default_factory=dict, repr=False)

    @cached_property
    def _search(self) -> tuple[Prefix, SearchTrace | None]:
        return search_prefix(self.ws)

    @property
    def searched(self) -> Prefix:
        """The prefix as the search found it; may be empty."""
        return self._search[0]

    @property
    def trace(self) -> SearchTrace | None:
        """What the search did."""
        return self._search[1]

    @cached_property
    def empty(self) -> Prefix:
        """No prefix."""
        return no_prefix(self.ws, self.searched)

    @cached_property
    def prefix(self) -> Prefix:
        """The prefix of every column 'with the prefix': tuned if the recipe tunes."""
        if self.ws.recipe.tuning.enabled and self.searched.length:
            return prepare(self.ws, self.searched).prefix
        return self.searched

    def altered(self, settings: dict[str, Any]) -> Workspace:
        """Return the run with some settings of the recipe replaced."""
        return self.ws.altered(settings)

    def built(self, prefix: Prefix, settings: dict[str, Any] | None = None) -> Deployed:
        """Return what the recipe, with some settings replaced, would deploy behind a prefix."""
        return prepare(self.altered(settings or {}), prefix)

    def in_scheme(self, name: str, prefix: Prefix) -> Variant:
        """Return the model in a named scheme of the paper: its alpha, and its ranges from minimum to maximum."""
        scheme = parse_scheme(name, quantize_head=self.ws.recipe.export.quantize_head)
        paper = self.altered({"smoothing.alpha": PAPER_ALPHA, "smoothing.limit": None})
        smoothing = smooth(paper, prefix) if scheme.smoothing else None
        scales = self._scales(scheme, smoothing, prefix) if scheme.activations == "static" else None
        return Variant(prefix, scheme, smoothing, scales)

    def _scales(self, scheme: QuantScheme, smoothing: Smoothing | None, prefix: Prefix) -> ActivationScales:
        ws = self.ws
        parents = {
            **calibration_parents(ws, prefix),
            "smoothing": smoothing.digest if smoothing else "",
            "scheme": scheme.digest,
        }

        def make(out: Path) -> None:
            from cushion_deploy.calib.calibrate import choose_scales, observe_sites
            from cushion_deploy.calib.estimators import RangeEstimator

            ids, mask = calibration_windows(ws, prefix)
            model = ws.folded(smoothing)
            scales = choose_scales(
                observe_sites(model, prefix, ids, mask, progress=ws.progress),
                RangeEstimator("max"),
                model.lineage(prefix, ws.corpus(ws.recipe.calibration.data, "calibration").digest),
                int(mask.sum()),
                bits=scheme.activation_bits,
                symmetric=scheme.symmetric,
            )
            write_scales(scales, out / SCALES_FILE)

        return read_scales(ws.stage("study-calibrate", parents, make) / SCALES_FILE)

    def scores(self, label: str, variant: Variant) -> tuple[Score, ...]:
        """Return perplexity and divergence on every text, one cell each."""
        return tuple(self._score(label, variant, text) for text in self.texts)

    def tokens(self, text: str | None) -> int:
        """Return how many tokens of a text are scored; asks the cell of the float model."""
        return int(self._scored("FP", Variant(self.empty), text)["tokens"])

    def _score(self, label: str, variant: Variant, text: str | None) -> Score:
        found = self._scored(label, variant, text)
        return Score(
            text=self.ws.corpus(text, "evaluation").name,
            perplexity=found["perplexity"],
            stderr=found["stderr"],
            divergence=found["divergence"],
        )

    def _scored(self, label: str, variant: Variant, text: str | None) -> dict[str, Any]:
        name = f"{label}, {self.ws.corpus(text, 'evaluation').name}"

        def compute() -> dict[str, Any]:
            from cushion_deploy.modeling.simulate import simulated

            ws, scheme = self.ws, variant.scheme
            windows, teacher = self._teacher(text, variant.prefix)
            model = ws.folded(variant.smoothing)
            with simulated(model, scheme, variant.scales) if scheme else nullcontext():
                found = teacher.compare(model, variant.prefix, windows, ws.progress, name)
            score = TextScore(found.losses)
            return {
                "tokens": score.tokens,
                "perplexity": _finite(score.perplexity),
                "stderr": _finite(score.stderr),
                # Rounding may take a divergence of nothing below zero.
                "divergence": _finite(max(found.divergence, 0.0)),
            }

        found: dict[str, Any] = self.cell("score", name, {**variant.parents, **self._text_parents(text)}, compute)
        return found

    def magnitudes(self, prefix: Prefix) -> list[dict[str, float]]:
        """Return the magnitudes of every layer's output on the first window (Figure 2)."""

        def compute() -> list[dict[str, float]]:
            from cushion_deploy.modeling.magnitudes import layer_magnitudes

            return layer_magnitudes(self.ws.model, prefix, self._windows(self.texts[0], prefix)[:1])

        parents = {"prefix": prefix.digest, **self._text_parents(self.texts[0])}
        found: list[dict[str, float]] = self.cell("magnitudes", _behind("magnitudes", prefix), parents, compute)
        return found

    def last_block(self, prefix: Prefix) -> dict[str, Any]:
        """Return what enters the last block (Table 5), and on how many windows of what length it was measured."""

        def compute() -> dict[str, Any]:
            from cushion_deploy.study.measure import block_input

            windows = self._windows(self.texts[0], prefix)[:BLOCK_WINDOWS]
            found = block_input(self.ws.model, prefix, windows, self.ws.progress)
            return {"windows": len(windows), "length": windows.shape[1], "input": found}

        parents = {"prefix": prefix.digest, "windows": BLOCK_WINDOWS, **self._text_parents(self.texts[0])}
        found: dict[str, Any] = self.cell("last-block", _behind("input of the last block", prefix), parents, compute)
        return found

    def attention(self, prefix: Prefix) -> dict[str, Any]:
        """Return where attention goes (Figure 3), and the tokens of the text."""

        def compute() -> dict[str, Any]:
            from cushion_deploy.study.measure import attention_shares

            ids = self._windows(self.texts[0], prefix)[:1, :ATTENTION_TOKENS]
            return {"tokens": ids.shape[1], "layers": attention_shares(self.ws.model, prefix, ids)}

        parents = {"prefix": prefix.digest, "length": ATTENTION_TOKENS, **self._text_parents(self.texts[0])}
        found: dict[str, Any] = self.cell("attention", _behind("attention", prefix), parents, compute)
        return found

    def cell(self, kind: str, label: str, parents: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the JSON value of a cell, computed now or in an earlier run.

        Args:
            kind: of measurement; names the stage.
            label: what people read.
            parents: all that decides the value beside the model.
            compute: returns the value.
        """

        def make(out: Path) -> None:
            begin = time.monotonic()
            value = compute()
            write_json(out / "cell.json", {"seconds": time.monotonic() - begin, "value": value})

        folder = self.ws.stage(f"study-{kind}", {"model": self.ws.source.digest, **parents}, make)
        found = read_json(folder / "cell.json")
        # The stage itself is the last that was timed; stages and loads within it came before.
        reused = self.ws.times[-1].reused
        self.done.setdefault(str(folder), Cell(name=label, seconds=found["seconds"], reused=reused))
        return found["value"]

    def _text_parents(self, text: str | None) -> dict[str, Any]:
        config = self.ws.recipe.evaluation
        digest = self.ws.corpus(text, "evaluation").digest
        return {"corpus": digest, "window": config.window, "max_tokens": config.max_tokens}

    def _windows(self, text: str | None, prefix: Prefix) -> IntArray:
        ws = self.ws
        require_positions(ws.recipe, ws.model.spec, prefix.length, ("evaluation",))
        corpus, config = ws.corpus(text, "evaluation"), ws.recipe.evaluation
        return cut_windows(ws.model.encode(corpus.text), config.window, config.max_tokens, corpus.name)

    def _teacher(self, text: str | None, prefix: Prefix) -> tuple[IntArray, Teacher]:
        from cushion_deploy.modeling.teacher import Teacher

        windows = self._windows(text, prefix)
        key = self.ws.corpus(text, "evaluation").digest
        if key not in self._teachers:
            teacher = Teacher(self.ws.model)
            teacher.remember(windows, self.ws.progress)
            self._teachers[key] = windows, teacher
        return self._teachers[key]


def _behind(what: str, prefix: Prefix) -> str:
    return f"{what}, {'with' if prefix.length else 'without'} the prefix"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
