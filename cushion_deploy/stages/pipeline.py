"""The table of a build: its stages, and the edges between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cushion_deploy.calib.corpora import Corpus, Part
from cushion_deploy.core.graph_form import MIN_OPSET, CacheForm, GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import PRECISIONS, QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.source import ModelSource, resolve_source
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.calibrate import Calibrate, CalibrateCache
from cushion_deploy.stages.compile import Compile
from cushion_deploy.stages.convert import Convert
from cushion_deploy.stages.evaluate import Evaluate
from cushion_deploy.stages.export import EngineGraph, Export
from cushion_deploy.stages.load import DescribeModel, Load
from cushion_deploy.stages.parity import Parity
from cushion_deploy.stages.publish import Publish
from cushion_deploy.stages.quantization import AssembleQuantization, WithoutPrefix
from cushion_deploy.stages.report import AssembleReport
from cushion_deploy.stages.sample import ReadText, Sample
from cushion_deploy.stages.search import NoPrefix, Search
from cushion_deploy.stages.sensitivity import ChooseScheme, Sensitivity, is_automatic
from cushion_deploy.stages.smooth import Smooth
from cushion_deploy.stages.tune import Tune
from cushion_deploy.stages.windows import longest_prefix


@dataclass(frozen=True)
class Branch:
    """Everything that is measured behind one prefix, and the quantization that it amounts to."""

    smoothing: Smooth | None
    calibration: Calibrate
    scheme: ChooseScheme
    tuning: Tune | None
    quantization: Node[Quantization]


class Pipeline:
    """The nodes of a recipe. Nothing is computed here: :class:`~cushion_deploy.stages.run.Run` makes the artifacts.

    Attributes:
        recipe: every setting.
        model, files: the model, and what it is.
        text, evaluation_text: what is calibrated and scored on.
        search: None where the recipe wants no prefix.
        prefix: the searched one, or none.
        quantized, bare: behind the prefix, and without one.
    """

    def __init__(self, recipe: Recipe, source: ModelSource) -> None:
        """Lay out the stages up to the quantization."""
        self.recipe = recipe
        self.model = Load(source, Convert(source) if source.kind == "gguf" else None)
        self.files = DescribeModel(self.model, source.generation_digest)
        self.text = self.corpus(recipe.calibration.data, "calibration")
        self.evaluation_text = self.corpus(recipe.evaluation.data, "evaluation")
        self.search = Search(self.model, self.text, recipe.search, recipe.seed) if longest_prefix(recipe) else None
        self.prefix = self.search.prefix if self.search else NoPrefix(self.model, self.files, bare=True)
        self.no_prefix = NoPrefix(self.model, self.files)
        self.quantized = self.behind(self.prefix)
        self.bare = self.behind(self.no_prefix, tuned=False)

    @classmethod
    def of(cls, recipe: Recipe) -> Pipeline:
        """Return the pipeline of a recipe; its model is found and checked, not loaded.

        Raises:
            UsageError: the recipe names no model, or one that cannot be used.
        """
        if recipe.model is None:
            raise UsageError("no model was given", hint="add --model FILE.gguf, --model FOLDER or --model org/name")
        return cls(recipe, resolve_source(recipe.model, recipe.revision))

    @property
    def source(self) -> ModelSource:
        """The checked model on disk."""
        return self.model.source

    def altered(self, settings: dict[str, object]) -> Pipeline:
        """Return the pipeline of the same model with some settings replaced; equal nodes share their artifacts."""
        return Pipeline(self.recipe.merged(settings), self.source)

    def corpus(self, data: str | None, part: Part) -> Node[Corpus]:
        """Return a text."""
        return ReadText.of(data, part, Sample(self.model, self.recipe.seed))

    @property
    def scheme(self) -> QuantScheme:
        """What the recipe quantizes, Sites that it keeps in floating point included."""
        return replace(PRECISIONS[self.recipe.precision], quantize_head=self.recipe.export.quantize_head)

    def smoothing(self, prefix: Node[Prefix]) -> Smooth | None:
        """Return the smoothing behind a prefix; None where the recipe wants none."""
        config, windows = self.recipe.smoothing, self.recipe.calibration
        if config.alpha is None:
            return None
        return Smooth(self.model, prefix, self.text, windows.windows, windows.window, config.alpha, config.limit)

    def behind(self, prefix: Node[Prefix], *, tuned: bool = True) -> Branch:
        """Return what is measured behind a prefix.

        Args:
            prefix: searched, given, or none.
            tuned: False leaves the tuning out whatever the recipe says.
        """
        recipe, smoothing = self.recipe, self.smoothing(prefix)
        calibration = self._calibrate(prefix, smoothing)
        scheme = self._scheme(prefix, smoothing, calibration)
        scales, tuning = calibration.scales, None
        if tuned and recipe.tuning.enabled and not isinstance(prefix, NoPrefix):
            start = AssembleQuantization(prefix, scheme, scales, smoothing)
            tuning = Tune(self.model, start, self.text, recipe.tuning, recipe.seed)
            prefix, scales = tuning.tuned_prefix, tuning.tuned_scales
            if not recipe.tuning.scales:
                calibration = self._calibrate(prefix, smoothing)
                scales = calibration.scales
        quantization = AssembleQuantization(prefix, scheme, scales, smoothing, self._kv_scales(prefix, smoothing))
        return Branch(smoothing, calibration, scheme, tuning, quantization)

    def _calibrate(self, prefix: Node[Prefix], smoothing: Smooth | None) -> Calibrate:
        config = self.recipe.calibration
        observed = self.model, prefix, self.text, config.windows, config.window
        return Calibrate(*observed, smoothing, config.estimator, config.percentile)

    def _kv_scales(self, prefix: Node[Prefix], smoothing: Smooth | None) -> CalibrateCache | None:
        config, export = self.recipe.calibration, self.recipe.export
        if export.kv_cache == "float":
            return None
        observed = self.model, prefix, self.text, config.windows, config.window
        return CalibrateCache(
            *observed, smoothing, config.estimator, config.percentile, export.kv_scales, export.prefix == "cache"
        )

    def _scheme(self, prefix: Node[Prefix], smoothing: Smooth | None, calibration: Calibrate) -> ChooseScheme:
        wishes, sensitivity = self.recipe.export.keep_float, None
        if any(map(is_automatic, wishes)):
            whole = AssembleQuantization(prefix, Given(self.scheme), calibration.scales, smoothing)
            sensitivity = Sensitivity(self.model, whole, self.text)
        return ChooseScheme(self.files, self.scheme, wishes, sensitivity)

    @staticmethod
    def form_of(recipe: Recipe) -> GraphForm:
        """Return the form of a bundle's graph."""
        export = recipe.export
        cache: CacheForm = "int8" if export.kv_cache == "int8" else "growing"
        return GraphForm(cache=cache, prefix=export.prefix, opset=export.opset or MIN_OPSET)

    @property
    def form(self) -> GraphForm:
        """The form of the bundle's graph."""
        return self.form_of(self.recipe)

    def graph(self, quantization: Node[Quantization], form: GraphForm | None = None) -> Export:
        """Return the graph of a quantization, in the bundle's form or another."""
        return Export(self.model, quantization, form or self.form)

    def engine_graph(self, quantization: Node[Quantization], graph: Node[ExportedGraph], engine: str) -> EngineGraph:
        """Return the graph that an engine compiles for a bundle with that graph."""
        plans = self.recipe.tensorrt
        return EngineGraph(self.model, quantization, graph, self.form, engine, plans.dtype, plans.max_context)

    def parity(
        self, quantization: Node[Quantization], graph: Node[ExportedGraph], plans: tuple[Node[ExportedGraph], ...]
    ) -> Parity:
        """Return the ladder of a graph, and of the graphs behind plans."""
        recipe = self.recipe
        text = self.corpus(recipe.parity.data or recipe.evaluation.data, "evaluation")
        # What the texts hold is an input; where they lie decides nothing.
        settings = recipe.parity.model_copy(update={"data": None}), recipe.evaluation.model_copy(update={"data": None})
        runtime = ENGINES["onnxruntime"].version()
        graphs = graph, self.form, plans
        return Parity(self.model, quantization, *graphs, text, self.evaluation_text, *settings, runtime)

    @property
    def evaluation(self) -> Evaluate:
        """Return the four columns."""
        config, quantization = self.recipe.evaluation, self.quantized.quantization
        bare = WithoutPrefix(quantization, self.bare.quantization)
        return Evaluate(
            self.model, quantization, bare, self.no_prefix, self.evaluation_text, config.window, config.max_tokens
        )

    def build(self, engines: tuple[str, ...], options: CompileOptions, output: Path) -> Publish:
        """Return the end of a build: the bundle in its place."""
        recipe, branch = self.recipe, self.quantized
        graph = self.graph(branch.quantization)
        plans = tuple(self.engine_graph(branch.quantization, graph, engine) for engine in engines)
        compiled = tuple(Compile.of(plan, name, options) for plan, name in zip(plans, engines, strict=True))
        parity = self.parity(branch.quantization, graph, plans)
        found = branch.calibration, branch.tuning, branch.quantization, graph, compiled, self.evaluation, parity
        report = AssembleReport(recipe, self.files, self.text, self.search, *found)
        return Publish(recipe, self.files, branch.quantization, graph, compiled, report, output)
