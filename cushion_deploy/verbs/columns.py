"""The columns of an evaluation: each way to run a model, opened for the time that it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from cushion_deploy.calib.corpora import Corpus, load_rows
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.perplexity import score_text
from cushion_deploy.evaluate.scorer import TORCH_WASTE, Scorer
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.chat import ChatTemplate
from cushion_deploy.runtime.engine import DEFAULT_ENGINE, open_engine
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.text import render_rows
from cushion_deploy.verbs.parity import pipeline_of_bundle

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

COLUMNS = {
    "fp": "FP",
    "fp-prefix": "FP + prefix",
    "quantized": "W8A8",
    "quantized-prefix": "W8A8 + prefix",
    "engine": "engine",
}
"""Ways to run a model and their headings, in the order of the table; all but the last run in torch."""


@dataclass(frozen=True)
class Column:
    """A way to run the model: its scorer, its encoding, and the losses of windows, float32 ``[count, window - 1]``."""

    scorer: Scorer
    encoding: Encoding
    losses: Callable[[IntArray, Progress, str], FloatArray]


@dataclass
class Columns:
    """Opens the columns of one evaluation, each for the time that it is scored.

    Attributes:
        recipe, run, bundle: see :func:`evaluate_columns`.
        threads: threads of the engine.
        engine: the engine of the column of that name.
    """

    recipe: Recipe
    run: Run
    bundle: Bundle | None
    threads: int | None
    engine: str = DEFAULT_ENGINE

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of the original model; raises UsageError if the given model is not the bundle's."""
        return pipeline_of_bundle(self.recipe, self.bundle.path) if self.bundle else Pipeline.of(self.recipe)

    @cached_property
    def model(self) -> TorchRunner:
        """The original model."""
        return self.run.get(self.pipeline.model)

    def corpus(self, data: str | None) -> Corpus:
        """Return a text, with conversations rendered through the chat template of the bundle or model.

        With a bundle, the model is loaded only for text that is sampled from it.
        """
        if self.bundle is None or data == "self":
            return self.run.get(self.pipeline.corpus(data, "evaluation"))
        return render_rows(load_rows(data, "evaluation"), self.bundle.chat_template)

    @contextmanager
    def open(self, column: str) -> Iterator[Column]:
        """Yield what a column is scored with; quantized weights are restored afterwards."""
        if self.bundle is not None and column == "engine":
            with elapsed(self.run.progress, f"loading {self.engine}"):
                session = open_engine(self.bundle, self.engine, self.threads)
            try:
                scorer = Scorer(session)
                encoding = Encoding.of_bundle(self.bundle)
                yield Column(scorer, encoding, lambda *args: score_text(scorer.nll, *args).losses)
            finally:
                session.close()
        elif column.startswith("quantized"):
            with self._quantized(column) as found:
                yield found
        else:
            prefix = self._built.prefix if column == "fp-prefix" else self.run.get(self.pipeline.no_prefix)
            yield self._in_torch(self.model, prefix)

    @contextmanager
    def _quantized(self, column: str) -> Iterator[Column]:
        from cushion_deploy.modeling.simulate import simulated

        used = self._built
        if column == "quantized" and used.prefix.length:
            # The same recipe without a prefix has its own smoothing and calibration.
            used = self.run.get(self.pipeline.bare.quantization)
        model = self.model.folded(used.smoothing)
        with ExitStack() as stack:
            with elapsed(self.run.progress, f"quantizing the weights: {COLUMNS[column]}"):
                stack.enter_context(simulated(model, used.scheme, used.scales, kv=used.kv_scales))
            yield self._in_torch(model, used.prefix)

    @property
    def _built(self) -> Quantization:
        """The quantization of the bundle."""
        if self.bundle is None:
            raise UsageError("a model that has not been built has no quantized columns", hint="build it first")
        return read_quantization(self.bundle.path, self.bundle.graph, self.pipeline.scheme)

    def _in_torch(self, model: TorchRunner, prefix: Prefix) -> Column:
        from cushion_deploy.modeling.session import TorchSession

        encoding = replace(self._encoding(), keep_bos=prefix.length == 0)
        scorer = Scorer(TorchSession(model, prefix), waste=TORCH_WASTE)
        return Column(scorer, encoding, lambda ids, progress, task: model.token_nll(ids, prefix, progress, task))

    def _encoding(self) -> Encoding:
        """Return the encoding of the model; the tokenizer of a bundle with a prefix adds no beginning of sequence."""
        tokenizer = self.model.tokenizer
        source = tokenizer.chat_template
        template = ChatTemplate(source, tokenizer.special_tokens_map) if isinstance(source, str) else None
        common = tokenizer.backend_tokenizer, tokenizer.bos_token_id, self.model.spec
        return Encoding.of_tokenizer(*common, chat_template=template)
