"""The stages between a model and its graph: search, calibrate, evaluate, export. Each is kept and reused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.artifacts import PREFIX_FILE, SCALES_FILE, read_prefix, read_scales, write_prefix, write_scales
from cushion_deploy.errors import UsageError
from cushion_deploy.pipeline.limits import require_positions
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.prefix.trace import SearchTrace
from cushion_deploy.progress import elapsed
from cushion_deploy.types import (
    ActivationScales,
    Dtype,
    ExportedGraph,
    IntArray,
    ModelSpec,
    Prefix,
)


@dataclass(frozen=True)
class Calibrated:
    """Scales and the largest magnitude seen at each Site."""

    scales: ActivationScales
    amax: dict[str, float]


def search_parents(ws: Workspace) -> dict[str, Any]:
    """Return what decides the result of the search."""
    return {
        "model": ws.source.digest,
        "corpus": ws.corpus(ws.recipe.calibration.data, "calibration").digest,
        "seed": ws.recipe.seed,
        "search": ws.recipe.search.model_dump(mode="json"),
    }


def calibrate_parents(ws: Workspace, prefix: str) -> dict[str, Any]:
    """Return what decides the scales behind the prefix of that digest."""
    return {
        "model": ws.source.digest,
        "prefix": prefix,
        "corpus": ws.corpus(ws.recipe.calibration.data, "calibration").digest,
        "calibration": ws.recipe.calibration.model_dump(mode="json", exclude={"data"}),
    }


def export_parents(ws: Workspace, prefix: str, scales: str | None, dtype: Dtype, name: str) -> dict[str, Any]:
    """Return what decides a graph, from the digests of prefix and scales."""
    from cushion_deploy.export.folder import MIN_OPSET

    return {
        "model": ws.source.digest,
        "prefix": prefix,
        "scales": scales,
        "scheme": ws.scheme.digest,
        "dtype": dtype,
        "opset": ws.recipe.export.opset or MIN_OPSET,
        "name": name,
    }


def export_stage(name: str) -> str:
    """Return the name of the stage that makes the graph ``name``."""
    return {"model": "export", "float": "export-float-twin"}.get(name, f"export-{name}")


def search_prefix(ws: Workspace) -> tuple[Prefix, SearchTrace | None]:
    """Return the prefix and the trace of its search; an empty prefix and None where the recipe wants none."""
    config = ws.recipe.search
    if not config.enabled or ws.recipe.export.prefix == "none":
        return Prefix.empty(ws.model.spec), None
    corpus = ws.corpus(ws.recipe.calibration.data, "calibration")
    parents = search_parents(ws)

    def make(out: Path) -> None:
        from cushion_deploy.prefix.search import PrefixSearch

        require_positions(ws.recipe, ws.model.spec, config.max_length, ("search",))
        scratch = ws.store.scratch("search", ws.key("search", parents))
        text = ws.model.encode(corpus.text)
        prefix, trace = PrefixSearch(ws.model, text, config, ws.recipe.seed, scratch, ws.progress).run()
        write_prefix(prefix, out / PREFIX_FILE)
        _write_json(out / "trace.json", trace.to_json())

    folder = ws.stage("search", parents, make)
    return read_prefix(folder / PREFIX_FILE), SearchTrace.from_json(_read_json(folder / "trace.json"))


def calibrate(ws: Workspace, prefix: Prefix) -> Calibrated:
    """Return static activation scales behind a prefix.

    Raises:
        UsageError: the prefix belongs to another model.
    """
    if prefix.model_digest != ws.source.digest:
        raise UsageError("the prefix was made for another model", hint="run `cushion-deploy search` for this model")
    config = ws.recipe.calibration
    corpus = ws.corpus(config.data, "calibration")
    parents = calibrate_parents(ws, prefix.digest)

    def make(out: Path) -> None:
        from cushion_deploy.calib.calibrate import choose_scales, observe_sites
        from cushion_deploy.calib.corpora import pack_windows

        require_positions(ws.recipe, ws.model.spec, prefix.length, ("calibration",))
        documents = [ws.model.encode(text) for text in corpus.documents]
        ids, mask = pack_windows(documents, config.window, config.windows, corpus.name)
        histograms = observe_sites(ws.model, prefix, ids, mask, progress=ws.progress)
        scales = choose_scales(
            histograms,
            config.estimator,
            percentile=config.percentile,
            model=ws.model,
            prefix=prefix,
            corpus_digest=corpus.digest,
            tokens=int(mask.sum()),
        )
        write_scales(scales, out / SCALES_FILE)
        _write_json(out / "amax.json", {site: h.amax for site, h in histograms.items()})

    folder = ws.stage("calibrate" if prefix.length else "calibrate-without-prefix", parents, make)
    return Calibrated(read_scales(folder / SCALES_FILE), _read_json(folder / "amax.json"))


def evaluation_windows(ws: Workspace) -> tuple[IntArray, str]:
    """Return the windows that perplexity is measured on, int64 ``[count, window]``, and the corpus name."""
    from cushion_deploy.evaluate.perplexity import cut_windows

    config = ws.recipe.evaluation
    corpus = ws.corpus(config.data, "evaluation")
    return cut_windows(ws.model.encode(corpus.text), config.window, config.max_tokens, corpus.name), corpus.name


def evaluate(ws: Workspace, prefix: Prefix, calibrated: Calibrated) -> dict[str, Any]:
    """Return the four columns of perplexity and the activation magnitudes per layer, without and with the prefix."""
    config = ws.recipe.evaluation
    corpus = ws.corpus(config.data, "evaluation")
    bare = calibrate(ws, _no_prefix(prefix)) if prefix.length else calibrated
    parents = {
        "scales": calibrated.scales.digest,
        "bare": bare.scales.digest,
        "prefix": prefix.digest,
        "scheme": ws.scheme.digest,
        "corpus": corpus.digest,
        "evaluation": config.model_dump(mode="json", exclude={"data"}),
    }

    def make(out: Path) -> None:
        from cushion_deploy.evaluate.perplexity import perplexity
        from cushion_deploy.modeling.forward import token_nll
        from cushion_deploy.modeling.magnitudes import layer_magnitudes
        from cushion_deploy.modeling.simulate import simulated

        require_positions(ws.recipe, ws.model.spec, prefix.length, ("evaluation",))
        windows, _ = evaluation_windows(ws)
        empty = _no_prefix(prefix)

        def measure(p: Prefix, task: str) -> float:
            return perplexity(lambda ids: token_nll(ws.model, ids, p), windows, ws.progress, f"perplexity: {task}")

        columns = {"fp": measure(empty, "FP")}
        columns["fp_prefix"] = measure(prefix, "FP + prefix") if prefix.length else columns["fp"]
        with simulated(ws.model, ws.scheme, bare.scales):
            columns["quantized"] = measure(empty, "W8A8")
        if prefix.length:
            with simulated(ws.model, ws.scheme, calibrated.scales):
                columns["quantized_prefix"] = measure(prefix, "W8A8 + prefix")
        else:
            columns["quantized_prefix"] = columns["quantized"]
        magnitudes = {
            "without": layer_magnitudes(ws.model, empty, windows[:1]),
            "with": layer_magnitudes(ws.model, prefix, windows[:1]),
        }
        scored = int(windows.shape[0] * (windows.shape[1] - 1))
        finite = {name: value if np.isfinite(value) else None for name, value in columns.items()}
        result = {"corpus": corpus.name, "window": config.window, "tokens": scored, **finite}
        _write_json(out / "evaluation.json", {"perplexity": result, "magnitudes": magnitudes})

    result: dict[str, Any] = _read_json(ws.stage("evaluate", parents, make) / "evaluation.json")
    return result


def export(
    ws: Workspace, prefix: Prefix, scales: ActivationScales | None, *, dtype: Dtype, name: str = "model"
) -> ExportedGraph:
    """Return the exported graph (``scales`` None: its float twin) in its stage folder."""
    parents = export_parents(ws, prefix.digest, scales.digest if scales else None, dtype, name)

    def make(out: Path) -> None:
        from cushion_deploy.export.folder import export_graph

        model = ws.model
        with elapsed(ws.progress, f"exporting the {dtype} graph"):
            graph = export_graph(
                model.spec,
                model.weights,
                prefix,
                scales,
                ws.scheme,
                out,
                name=name,
                dtype=dtype,
                opset=parents["opset"],
            )
        _write_json(out / "export.json", graph.to_json())

    folder = ws.stage(export_stage(name), parents, make)
    return ExportedGraph.from_json(_read_json(folder / "export.json"), folder)


def model_files(ws: Workspace) -> Path:
    """Return a folder with the files of the model that a bundle carries, and its ``spec.json``."""

    def make(out: Path) -> None:
        model = ws.model
        model.module.config.save_pretrained(out)
        model.module.generation_config.save_pretrained(out)
        model.tokenizer.save_pretrained(out)
        _write_json(out / "spec.json", asdict(model.spec))

    return ws.stage("tokenizer", {"model": ws.source.digest}, make)


def model_spec(ws: Workspace) -> ModelSpec:
    """Return the description of the model, without loading it where an earlier run wrote it down."""
    return ModelSpec.from_json(_read_json(model_files(ws) / "spec.json"))


def _no_prefix(prefix: Prefix) -> Prefix:
    """Return the empty prefix of the same model."""
    return Prefix((), prefix.keys[:, :, :0], prefix.values[:, :, :0], prefix.model_digest)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
