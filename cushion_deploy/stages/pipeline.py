"""The build pipeline: its stages, and the edges between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cushion_deploy.calib.corpora import Part
from cushion_deploy.core.graph_form import MIN_OPSET, CacheForm, GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.host import installed_versions
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.value_range import ValueRange
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.settings import has_head_kernel
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.source import ModelSource, resolve_source
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.statements import UNTUNED, WITHOUT
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.calibrate import Calibrate, CalibrateCache
from cushion_deploy.stages.chat import ReadChat
from cushion_deploy.stages.choose import Choose, Chosen
from cushion_deploy.stages.compile import Compile, EngineToRun, OpenCompiled
from cushion_deploy.stages.convert import Convert
from cushion_deploy.stages.embedding import ExactEmbedding
from cushion_deploy.stages.engine_graph import EngineGraph, engine_form
from cushion_deploy.stages.evaluate import Evaluate
from cushion_deploy.stages.export import Export
from cushion_deploy.stages.load import DescribeModel, Load, compute_dtype
from cushion_deploy.stages.parity import GraphsOfPlans, Parity
from cushion_deploy.stages.plan_type import ChoosePlanType, MeasureRange, has_plan_type
from cushion_deploy.stages.publish import Publish
from cushion_deploy.stages.quantization import AssembleQuantization, WithoutPrefix
from cushion_deploy.stages.report import AssembleReport
from cushion_deploy.stages.sample import Sample
from cushion_deploy.stages.search import NoPrefix, Search
from cushion_deploy.stages.sensitivity import ChooseScheme, Sensitivity, is_automatic
from cushion_deploy.stages.smooth import Smooth
from cushion_deploy.stages.text import ReadText
from cushion_deploy.stages.tune import Tune
from cushion_deploy.stages.windows import Cut, longest_prefix

T = TypeVar("T")
WITH = "with prefix"
"""Name of the model with the prefix among those that a build compares."""


@dataclass(frozen=True)
class Branch:
    """Everything that is measured behind one prefix, and the quantization that results from it.

    Attributes:
        tuning: the stage that the prefix comes from; None for a prefix that was not tuned.
    """

    smoothing: Smooth | None
    calibration: Calibrate
    scheme: ChooseScheme
    tuning: Tune | None
    quantization: Node[Quantization]


class Pipeline:
    """The nodes of a recipe. Nothing is computed here: :class:`~cushion_deploy.stages.run.Run` makes the artifacts.

    Attributes:
        recipe: every setting.
        model, files: the model, and its configuration, tokenizer and spec.
        exact_model: the same model in float32, the type in which the parity ladder compares codes.
        text, evaluation_text: the texts for calibration and evaluation.
        search: None if the recipe disables the prefix.
        prefix: the prefix found by the search, or no prefix.
        quantized, bare: the branches with and without the prefix.
        choice: the choice among the two and, where the recipe tunes it, the untuned prefix; None if there is none.
    """

    def __init__(self, recipe: Recipe, source: ModelSource) -> None:
        """Create the nodes up to the quantization."""
        self.recipe = recipe
        converted = Convert(source) if source.kind == "gguf" else None
        self.model = Load(source, converted, compute_dtype(recipe.compute, source), recipe.compute)
        self.exact_model = Load(source, converted, "float32", recipe.compute)
        self.files = DescribeModel(self.model, source.generation_digest)
        self.text = self.corpus(recipe.calibration.data, "calibration")
        self.evaluation_text = self.corpus(recipe.evaluation.data, "evaluation")
        # Whether the prefix ships does not change what is found.
        search = recipe.search.model_copy(update={"ship": "auto"})
        self.search = Search(self.model, self.text, search, recipe.seed) if longest_prefix(recipe) else None
        self.prefix = self.search.prefix if self.search else NoPrefix(self.model, self.files, bare=True)
        self.no_prefix = NoPrefix(self.model, self.files)
        self.quantized = self.behind(self.prefix)
        self.bare = self.behind(self.no_prefix, tuned=False)
        self.choice = self._choice() if self.search and recipe.search.ship == "auto" else None

    @classmethod
    def of(cls, recipe: Recipe) -> Pipeline:
        """Return the pipeline of a recipe; the model is located and validated, but not loaded.

        Raises:
            UsageError: the recipe names no model, or one that cannot be used.
        """
        return cls(recipe, cls.locate(recipe))

    @staticmethod
    def locate(recipe: Recipe) -> ModelSource:
        """Return the validated model of a recipe on disk; raises UsageError if there is none that can be used."""
        if recipe.model is None:
            raise UsageError("no model was given", hint="add --model FILE.gguf, --model FOLDER or --model org/name")
        return resolve_source(recipe.model, recipe.revision)

    def given_prefix(self, prefix: Prefix) -> Node[Prefix]:
        """Return the node of a prefix from a file; raises UsageError if it was made for another model."""
        hint = "run `cushion-deploy search` for this model"
        prefix.lineage.require("the prefix was made for", hint, {"model": self.source.digest})
        return Given(prefix)

    @property
    def source(self) -> ModelSource:
        """The validated model on disk."""
        return self.model.source

    def altered(self, settings: dict[str, object]) -> Pipeline:
        """Return the pipeline of the same model with some settings replaced; equal nodes share their artifacts."""
        return Pipeline(self.recipe.merged(settings), self.source)

    def corpus(self, data: str | None, part: Part) -> ReadText:
        """Return the node of a calibration or evaluation text."""
        return ReadText.of(data, part, Sample(self.model, self.recipe.seed), self.files)

    @property
    def scheme(self) -> QuantScheme:
        """The recipe's scheme; see :attr:`Recipe.scheme`."""
        return self.recipe.scheme

    def smoothing(self, prefix: Node[Prefix]) -> Smooth | None:
        """Return the smoothing stage behind a prefix; None if the recipe disables smoothing."""
        config, windows = self.recipe.smoothing, self.recipe.calibration
        if not config.enabled:
            return None
        return Smooth(self.model, prefix, self.text, windows.windows, windows.window, config)

    def behind(self, prefix: Node[Prefix], *, tuned: bool = True) -> Branch:
        """Return the branch that is measured behind a prefix.

        Behind a prefix that was tuned to be invisible everything is measured anew, as behind any other prefix.

        Args:
            prefix: found by the search, given, or none.
            tuned: False skips tuning even if the recipe enables it.
        """
        recipe, smoothing = self.recipe, self.smoothing(prefix)
        calibration = self._calibrate(prefix, smoothing)
        scheme = self._scheme(prefix, smoothing, calibration)
        scales, tuning = calibration.scales, None
        if tuned and recipe.tuning.enabled and not isinstance(prefix, NoPrefix):
            start = AssembleQuantization(prefix, scheme, scales, smoothing)
            tuning = Tune(self.model, start, self.text, recipe.tuning, recipe.seed)
            if not recipe.tuning.quantized:
                return replace(self.behind(tuning.tuned_prefix, tuned=False), tuning=tuning)
            # Trained or not, the scales are those that the kept state was judged with.
            prefix, scales = tuning.tuned_prefix, tuning.tuned_scales
        quantization = AssembleQuantization(prefix, scheme, scales, smoothing, self._kv_scales(prefix, smoothing))
        return Branch(smoothing, calibration, scheme, tuning, quantization)

    @property
    def candidates(self) -> dict[str, Branch]:
        """The branches that may ship, by name; the untuned prefix is one of them where the recipe tunes it."""
        untuned = {UNTUNED: self.behind(self.prefix, tuned=False)} if self.quantized.tuning else {}
        return {WITHOUT: self.bare, **untuned, WITH: self.quantized}

    def _choice(self) -> Choose:
        config, names = self.recipe.calibration, tuple(self.candidates)
        quantizations = tuple(branch.quantization for branch in self.candidates.values())
        chat = ReadChat(self.files, self.text)
        return Choose(self.model, names, quantizations, self.text, config.windows, config.window, chat)

    def shipped(self, part: Callable[[Branch], Node[T]]) -> Node[T]:
        """Return a part of the branch that ships."""
        if self.choice is None:
            return part(self.quantized)
        return Chosen(self.choice, tuple(self.candidates), tuple(map(part, self.candidates.values())))

    @property
    def shipped_quantization(self) -> Node[Quantization]:
        """The quantization that ships."""
        return self.shipped(lambda branch: branch.quantization)

    @property
    def _with_prefix(self) -> Node[Quantization]:
        """The quantization with the prefix: the tuned one, unless the untuned one ships."""
        if self.choice is None:
            return self.quantized.quantization
        names = tuple(self.candidates)
        kept = {name: branch if name == UNTUNED else self.quantized for name, branch in self.candidates.items()}
        return Chosen(self.choice, names, tuple(branch.quantization for branch in kept.values()))

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
        keep_float, sensitivity = self.recipe.export.keep_float, None
        if any(map(is_automatic, keep_float)):
            whole = AssembleQuantization(prefix, Given(self.scheme), calibration.scales, smoothing)
            sensitivity = Sensitivity(self.model, whole, self.text)
        return ChooseScheme(self.files, self.scheme, keep_float, sensitivity, self._embedding)

    @property
    def _embedding(self) -> ExactEmbedding | None:
        # Without its kernel a head on codes is slower than one in floating point.
        undecided = self.recipe.export.embedding == "auto" and has_head_kernel()
        return ExactEmbedding(self.model) if undecided else None

    @property
    def whole_scheme(self) -> ChooseScheme:
        """The scheme with every Site quantized, and the embedding as it ships."""
        return ChooseScheme(self.files, self.scheme, (), None, self._embedding)

    @staticmethod
    def form_of(recipe: Recipe) -> GraphForm:
        """Return the form of a bundle's graph."""
        export = recipe.export
        cache: CacheForm = "int8" if export.kv_cache == "int8" else "growing"
        codes = export.embedding != "float"
        return GraphForm(cache=cache, prefix=export.prefix, opset=export.opset or MIN_OPSET, gathers_codes=codes)

    @property
    def form(self) -> GraphForm:
        """The form of the bundle's graph."""
        return self.form_of(self.recipe)

    def graph(
        self, quantization: Node[Quantization], form: GraphForm | None = None, in_place_context: int = 0
    ) -> Export:
        """Return the export of a quantization, in the bundle's form or the given one."""
        return Export(self.model, quantization, form or self.form, in_place_context)

    def engine_graph(
        self, quantization: Node[Quantization], graph: Node[ExportedGraph], engine: str
    ) -> Node[ExportedGraph]:
        """Return the graph that an engine compiles: the bundle's ``graph``, or an export in another form."""
        plans, dtypes = self.recipe.tensorrt, ENGINES[engine].dtypes
        form, in_place_context = engine_form(self.form, ENGINES[engine], plans.dtype, plans.max_context)
        if (form, in_place_context) == (self.form, 0):
            return graph
        plan_type = self.plan_type(quantization) if form.dtype == "float16" else None
        return EngineGraph(graph, self.form, self.graph(quantization, form, in_place_context), plan_type, dtypes)

    def plan_type(self, quantization: Node[Quantization], measured: Node[ValueRange] | None = None) -> ChoosePlanType:
        """Return the floating-point type of plans, chosen from values that were ``measured`` before or will be."""
        wanted, config = self.recipe.tensorrt.dtype, self.recipe.calibration
        if wanted in ("bfloat16", "float32"):
            return ChoosePlanType(wanted, None)
        observed = replace(self.form, dtype="float16"), self.text, config.windows, config.window
        return ChoosePlanType(wanted, measured or MeasureRange(self.model, quantization, *observed))

    def parity(
        self,
        quantization: Node[Quantization],
        graph: Node[ExportedGraph],
        plans: tuple[Node[ExportedGraph], ...],
        engines: tuple[Node[EngineToRun | None], ...] = (),
    ) -> Parity:
        """Return the parity stage of a graph, including the graphs behind the given plans and the given engines."""
        recipe = self.recipe
        text = self.corpus(recipe.parity.data or recipe.evaluation.data, "evaluation")
        # The content of the texts is an input; their location is not.
        settings = recipe.parity.model_copy(update={"data": None}), Cut.of(recipe, recipe.evaluation.data)
        versions = installed_versions(("onnxruntime", "onnxruntime-gpu"))
        runtime = ", ".join(f"{name} {version}" for name, version in versions.items())
        graphs = graph, self.form, GraphsOfPlans(graph, plans)
        texts = text, self.evaluation_text
        return Parity(self.exact_model, quantization, *graphs, *texts, *settings, runtime, engines)

    @property
    def evaluation(self) -> Evaluate:
        """Return the evaluation stage with its four columns."""
        quantization, cut = self._with_prefix, Cut.of(self.recipe, self.recipe.evaluation.data)
        bare: Node[Quantization]
        bare = WithoutPrefix(quantization, self.bare.quantization) if self.search else quantization
        text = self.evaluation_text
        return Evaluate(self.model, quantization, bare, self.no_prefix, text, cut, ReadChat(self.files, text))

    def build(self, engines: tuple[str, ...], options: CompileOptions, output: Path) -> Publish:
        """Return the final node of a build, which publishes the bundle."""
        recipe, branch, quantization = self.recipe, self.quantized, self.shipped_quantization
        graph = self.graph(quantization)
        plans = tuple(self.engine_graph(quantization, graph, engine) for engine in engines)
        compiled = tuple(Compile.of(plan, name, options) for plan, name in zip(plans, engines, strict=True))
        parity = self.parity(quantization, graph, plans, _other_engines(compiled, plans))
        calibration = self.shipped(lambda each: each.calibration)
        plan_type = self.plan_type(quantization) if any(map(has_plan_type, engines)) else None
        found = calibration, branch.tuning, self.choice, quantization, graph, plan_type, compiled
        report = AssembleReport(recipe, self.files, self.text, self.search, *found, self.evaluation, parity)
        return Publish(recipe, self.files, quantization, graph, compiled, report, self.source, output)


def _other_engines(
    compiled: tuple[Compile, ...], graphs: tuple[Node[ExportedGraph], ...]
) -> tuple[Node[EngineToRun | None], ...]:
    """Return the engines that run what they compiled; ONNX Runtime on the CPU is on every ladder anyway."""
    pairs = zip(compiled, graphs, strict=True)
    return tuple(OpenCompiled(c, graph) for c, graph in pairs if ENGINES[c.engine].compiles_to != "report")
