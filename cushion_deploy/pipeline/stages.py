"""The stages around what is deployed: search the prefix, evaluate, export. Each is kept and reused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.artifacts import read_prefix, write_prefix
from cushion_deploy.core.dtypes import Dtype, IntArray
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.progress import elapsed
from cushion_deploy.engines.base import Engine
from cushion_deploy.families import get_family
from cushion_deploy.pipeline.files import read_json, write_json
from cushion_deploy.pipeline.limits import require_positions
from cushion_deploy.pipeline.prepare import Deployed, prepare
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.prefix.trace import SearchTrace


def search_prefix(ws: Workspace) -> tuple[Prefix, SearchTrace | None]:
    """Return the prefix and the trace of its search; an empty prefix and None where the recipe wants none."""
    config = ws.recipe.search
    if not config.enabled or ws.recipe.export.prefix == "none":
        return Prefix.empty(ws.model.spec), None
    corpus = ws.corpus(ws.recipe.calibration.data, "calibration")
    parents = {
        "model": ws.source.digest,
        "corpus": corpus.digest,
        "seed": ws.recipe.seed,
        "search": config.model_dump(mode="json"),
    }

    def make(out: Path) -> None:
        from cushion_deploy.prefix.search import PrefixSearch

        require_positions(ws.recipe, ws.model.spec, config.max_length, ("search",))
        scratch = ws.store.scratch("search", ws.key("search", parents))
        text = ws.model.encode(corpus.text)
        prefix, trace = PrefixSearch(ws.model, text, config, ws.recipe.seed, scratch, ws.progress).run()
        write_prefix(prefix, out / PREFIX_FILE)
        write_json(out / "trace.json", trace.to_json())

    folder = ws.stage("search", parents, make)
    return read_prefix(folder / PREFIX_FILE), SearchTrace.from_json(read_json(folder / "trace.json"))


def evaluation_windows(ws: Workspace) -> tuple[IntArray, str]:
    """Return the windows that perplexity is measured on, int64 ``[count, window]``, and the corpus name."""
    from cushion_deploy.evaluate.perplexity import cut_windows

    config = ws.recipe.evaluation
    corpus = ws.corpus(config.data, "evaluation")
    return cut_windows(ws.model.encode(corpus.text), config.window, config.max_tokens, corpus.name), corpus.name


def evaluate(ws: Workspace, deployed: Deployed) -> dict[str, Any]:
    """Return perplexity and divergence in four columns, and magnitudes per layer, without and with the prefix.

    The column 'quantized' is the same recipe without a prefix: its own smoothing and scales, nothing tuned.
    """
    config, prefix = ws.recipe.evaluation, deployed.prefix
    corpus = ws.corpus(config.data, "evaluation")
    empty = no_prefix(ws, prefix)
    bare = prepare(ws, empty) if prefix.length else deployed
    parents = {
        "scales": deployed.scales.digest,
        "bare": bare.scales.digest,
        "prefix": prefix.digest,
        "scheme": [deployed.scheme.digest, bare.scheme.digest],
        "corpus": corpus.digest,
        "evaluation": config.model_dump(mode="json", exclude={"data"}),
    }
    for name, d in (("kv scales", deployed), ("bare kv scales", bare)):
        if d.kv:
            parents[name] = d.kv.digest

    def make(out: Path) -> None:
        from cushion_deploy.evaluate.perplexity import TextScore
        from cushion_deploy.modeling.magnitudes import layer_magnitudes
        from cushion_deploy.modeling.simulate import simulated
        from cushion_deploy.modeling.teacher import Fidelity, Teacher

        require_positions(ws.recipe, ws.model.spec, prefix.length, ("evaluation",))
        windows, _ = evaluation_windows(ws)
        teacher = Teacher(ws.model)
        teacher.remember(windows, ws.progress)

        def measure(d: Deployed, name: str, *, quantized: bool) -> Fidelity:
            model = ws.folded(d.smoothing) if quantized else ws.model
            with simulated(model, d.scheme, d.scales, kv=d.kv) if quantized else nullcontext():
                return teacher.compare(model, d.prefix, windows, ws.progress, f"perplexity: {name}")

        columns = {"fp": measure(bare, "FP", quantized=False)}
        columns["fp_prefix"] = measure(deployed, "FP + prefix", quantized=False) if prefix.length else columns["fp"]
        columns["quantized"] = measure(bare, "W8A8", quantized=True)
        columns["quantized_prefix"] = (
            measure(deployed, "W8A8 + prefix", quantized=True) if prefix.length else columns["quantized"]
        )
        plain = measure(replace(deployed, kv=None), "W8A8, float cache", quantized=True) if deployed.kv else None
        magnitudes = {
            "without": layer_magnitudes(ws.model, empty, windows[:1]),
            "with": layer_magnitudes(ws.model, prefix, windows[:1]),
        }
        scored = int(windows.shape[0] * (windows.shape[1] - 1))
        finite = {name: _finite(TextScore(f.losses).perplexity) for name, f in columns.items()}
        apart = {name: _finite(f.divergence) for name, f in columns.items()}
        result = {"corpus": corpus.name, "window": config.window, "tokens": scored, **finite, "divergence": apart}
        found: dict[str, Any] = {"perplexity": result, "magnitudes": magnitudes}
        if plain:
            score, divergence = TextScore(plain.losses).perplexity, plain.divergence
            found["float_cache"] = {"perplexity": _finite(score), "divergence": _finite(divergence)}
        write_json(out / "evaluation.json", found)

    result: dict[str, Any] = read_json(ws.stage("evaluate", parents, make) / "evaluation.json")
    return result


def plan_form(
    ws: Workspace, deployed: Deployed, engine: Engine, contract: GraphContract, context: int
) -> tuple[Dtype, int]:
    """Return the floating-point type and the capacity of the cache that an engine's graph shall have; 0 lets it grow.

    Where the prefix is in the cache, that is in floating point, and the engine updates it in place, the cache is
    static: as long as ``context`` (without the prefix) and the model's positions allow.

    Args:
        ws, deployed, engine: what is compiled.
        contract: of the bundle's graph.
        context: longest context of the plan.
    """
    wanted, length = ws.recipe.tensorrt.dtype, deployed.prefix.length
    static = contract.prefix_slots > 0 and engine.in_place_cache and not deployed.kv
    capacity = min(context + length, contract.max_positions) if static else 0
    return wanted if wanted in engine.dtypes else engine.dtypes[0], capacity


def plan_graph(ws: Workspace, deployed: Deployed, engine: Engine, graph: ExportedGraph, context: int) -> ExportedGraph:
    """Return the graph that an engine compiles: the bundle's ``graph``, or one of another form, in its stage folder."""
    dtype, capacity = plan_form(ws, deployed, engine, graph.contract, context)
    if (dtype, capacity) == (graph.contract.dtype, 0):
        return graph
    return export(ws, deployed, dtype=dtype, name=dtype, capacity=capacity)


def export(
    ws: Workspace, deployed: Deployed, *, dtype: Dtype, name: str = "model", quantized: bool = True, capacity: int = 0
) -> ExportedGraph:
    """Return the exported graph, or its float twin, in its stage folder."""
    from cushion_deploy.export.folder import MIN_OPSET

    opset = ws.recipe.export.opset or MIN_OPSET
    parents = {
        "model": ws.source.digest,
        "prefix": deployed.prefix.digest,
        "smoothing": deployed.smoothing.digest if deployed.smoothing else "",
        "scales": deployed.scales.digest if quantized else None,
        "scheme": deployed.scheme.digest,
        "dtype": dtype,
        "opset": opset,
        "name": name,
        "prefix_mode": ws.recipe.export.prefix,
        **({"capacity": capacity} if capacity else {}),
    }
    if deployed.kv and quantized:
        parents["kv scales"] = deployed.kv.digest

    def make(out: Path) -> None:
        with elapsed(ws.progress, f"exporting the {dtype} graph"):
            graph = export_deployed(
                ws, deployed, out, dtype=dtype, name=name, quantized=quantized, opset=opset, capacity=capacity
            )
        write_json(out / "export.json", graph.to_json())

    stage = {"model": "export", "float": "export-float-twin"}.get(name, f"export-{name}")
    folder = ws.stage(stage, parents, make, lambda: ws.model.spec.parameters * (2 if quantized else 4))
    return ExportedGraph.from_json(read_json(folder / "export.json"), folder)


def export_deployed(
    ws: Workspace,
    deployed: Deployed,
    folder: Path,
    *,
    dtype: Dtype,
    name: str,
    quantized: bool,
    opset: int,
    capacity: int = 0,
) -> ExportedGraph:
    """Write a graph into a folder and return it."""
    from cushion_deploy.export.folder import export_graph

    return export_graph(
        ws.model.spec,
        ws.model.weights,
        deployed.prefix,
        deployed.scales if quantized else None,
        deployed.scheme,
        folder,
        smoothing=deployed.smoothing,
        kv=deployed.kv if quantized else None,
        name=name,
        dtype=dtype,
        opset=opset,
        prefix_in_cache=ws.recipe.export.prefix == "cache",
        capacity=capacity,
    )


def model_files(ws: Workspace) -> Path:
    """Return a folder with the files of the model that a bundle carries, and its ``spec.json``."""

    def make(out: Path) -> None:
        model = ws.model
        model.module.config.save_pretrained(out)
        model.module.generation_config.save_pretrained(out)
        model.tokenizer.save_pretrained(out)
        _name_tokenizer(out / "tokenizer_config.json")
        write_json(out / "spec.json", asdict(model.spec))

    return ws.stage("tokenizer", {"model": ws.source.digest}, make)


def _name_tokenizer(file: Path) -> None:
    """Give a generic tokenizer the name that transformers 4 knows as well, and optimum with it."""
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def model_spec(ws: Workspace) -> ModelSpec:
    """Return the description of the model, without loading it where an earlier run wrote it down."""
    return ModelSpec.from_json(read_json(model_files(ws) / "spec.json"))


def no_prefix(ws: Workspace, like: Prefix) -> Prefix:
    """Return what stands before a text where no prefix does; of the same model and shape as another prefix.

    Nothing, unless the model is never run without its ``<bos>``.
    """
    if get_family(model_spec(ws).family).needs_bos:
        return ws.model.compute_prefix(ws.model.bare_tokens)
    shape = (*like.keys.shape[:2], 0, like.keys.shape[3])
    return Prefix((), np.zeros(shape, np.float32), np.zeros(shape, np.float32), like.model_digest)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
