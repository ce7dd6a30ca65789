"""An INT8 cache in every family: graph and torch agree, whole builds pass the ladder, a plan is built."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kv_cache import choose_kv_scales, observe_cache
from cushion_deploy.cli.main import run as command
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.simulate import quantized_cache
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import Report
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore, verify_bundle
from cushion_deploy.verbs.build import build
from cushion_deploy.verbs.parity import check_bundle

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
TOKENS = (7, 1, 100)
SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime", *(["tensorrt-rtx"] if RTX else [])],
    "export.kv_cache": "int8",
    "search.ship": "always",
    "search.seed_tokens": ["<s>"],
    "search.max_length": 1,
    "search.text_tokens": 48,
    "search.random_candidates": 4,
    "search.screen_candidates": 4,
    "search.gradient_candidates": 4,
    "search.audit_tokens": 4,
    "calibration.windows": 2,
    "calibration.window": 48,
    "evaluation.window": 48,
    "evaluation.max_tokens": 96,
    "parity.tokens": 40,
    "parity.decode_tokens": 3,
}
BUILDS = [
    ("llama", "baked", "per-head"),
    ("qwen3", "cache", "per-head"),
    ("gemma2", "cache", "per-tensor"),
    ("bloom", "baked", "per-tensor"),
]


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
def test_the_graph_of_every_family_is_torch_with_a_simulated_cache(
    variant: str, granularity: Any, load_variant: Any, tmp_path: Path
) -> None:
    model = load_variant(variant)
    prefix = model.compute_prefix(TOKENS)
    ids = np.random.default_rng(5).integers(3, 320, (1, 40))
    kv = choose_kv_scales(
        observe_cache(model, prefix, ids, np.ones_like(ids), granularity), RangeEstimator("max"), granularity,
        prefix, model.lineage(prefix, "c"), 40, with_prefix=False,
    )  # fmt: skip
    with torch.inference_mode(), quantized_cache(model, kv):
        expected = model.run(torch.from_numpy(ids), model.past(prefix)).logits.numpy()
    quantization, form = Quantization(prefix, QuantScheme(), kv_scales=kv), GraphForm(quantized=False, cache="int8")
    graph = export_graph(model.spec, model.weights, quantization, form, tmp_path)
    session = open_session(graph, threads=1, chunk=40)
    found = session.run(ids, need_logits="all")
    # Equal to 1e-5, but where a code lies at a tie: that one moves much less than the rounding of all codes does.
    close = 0.1 * np.abs(model.logits(ids, prefix) - expected).max()
    assert np.abs(found - expected).max() <= close
    session.reset()
    session.run(ids[:, :36], need_logits="none")
    steps = np.concatenate([session.run(ids[:, i : i + 1]) for i in range(36, 40)], axis=1)
    assert np.abs(steps - expected[:, 36:]).max() <= close


@pytest.fixture(scope="module", params=BUILDS, ids=" ".join)
def built(request: pytest.FixtureRequest, variant_folder: Any, tmp_path_factory: Any) -> tuple[Report, Path, Recipe]:
    """Return the report, the bundle and the recipe of a build with an INT8 cache."""
    variant, prefix, granularity = request.param
    folder = tmp_path_factory.mktemp("int8")
    (folder / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (folder / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 8)
    data = {"calibration.data": str(folder / "calib.txt"), "evaluation.data": str(folder / "eval.txt")}
    shape = {"export.prefix": prefix, "export.kv_scales": granularity}
    recipe = Recipe().merged({"model": str(variant_folder(variant)), **data, **SETTINGS, **shape})
    return build(recipe, Run(StageStore(folder / "work")), folder / "bundle"), folder / "bundle", recipe


def test_a_whole_build_passes_every_check(built: tuple[Report, Path, Recipe]) -> None:
    report, bundle, recipe = built
    assert [check for check in report.parity if not check.passed] == []
    assert any("kv_scales.json" in check.rung for check in report.parity)
    verify_bundle(bundle)
    opened = open_bundle(bundle)
    assert opened.contract.cache_dtype == "int8"
    assert (bundle / "kv_scales.json").is_file()
    assert (bundle / "genai_config.json").exists() == (recipe.export.prefix == "baked")
    for engine in report.engines:
        assert engine.int8_linears == engine.linears > 0, engine
        assert not any("DequantizeLinear -> MatMul" in left for left in engine.details.get("left_in_float", ()))
    kv = read_quantization(bundle, opened.graph, Pipeline.of(recipe).scheme).kv_scales
    assert kv is not None
    assert kv.granularity == recipe.export.kv_scales
    assert kv.with_prefix == (recipe.export.prefix == "cache")


def test_the_report_tells_what_the_cache_costs(built: tuple[Report, Path, Recipe]) -> None:
    report, _, recipe = built
    assert report.kv_cache is not None
    assert report.perplexity is not None
    assert report.kv_cache.float_perplexity != report.perplexity.quantized_prefix
    assert report.kv_cache.float_perplexity == pytest.approx(report.perplexity.quantized_prefix, rel=0.1)
    spec = load_folder(Path(str(recipe.model)), resolve_source(str(recipe.model))).spec
    assert report.kv_cache.bytes_a_token == 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert report.kv_cache.float32_bytes_a_token == 4 * report.kv_cache.bytes_a_token


def test_a_bundle_is_checked_again_from_its_files(built: tuple[Report, Path, Recipe]) -> None:
    _, bundle, recipe = built
    again = check_bundle(recipe, Run(StageStore(bundle.parent / "work")), bundle, open_bundle(bundle).graph)
    assert again.passed


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is an optional extra: pip install 'cushion-deploy[rtx]'")
def test_fused_attention_is_what_the_same_graph_has_with_a_floating_point_cache(
    built: tuple[Report, Path, Recipe], tmp_path: Path
) -> None:
    from cushion_deploy.engines.base import CompileOptions
    from cushion_deploy.engines.registry import ENGINES

    report, bundle, recipe = built
    q = read_quantization(bundle, open_bundle(bundle).graph, Pipeline.of(recipe).scheme)
    source = resolve_source(str(recipe.model))
    model = load_folder(source.path, source)
    folder = tmp_path / "plan"
    folder.mkdir()
    quantization = replace(q, kv_scales=None)
    form = GraphForm(dtype="float16", prefix=recipe.export.prefix)
    graph = export_graph(model.spec, model.weights, quantization, form, tmp_path)
    floating = ENGINES["tensorrt-rtx"].compile(graph, folder, CompileOptions())
    (plan,) = [engine for engine in report.engines if engine.engine == "tensorrt-rtx"]
    assert plan.fused_attention == floating.fused_attention


def test_onnxruntime_genai_makes_its_caches_of_the_type_of_the_graph(built: tuple[Report, Path, Recipe]) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _, bundle, recipe = built
    if recipe.export.prefix == "cache":
        pytest.skip("it begins with an empty cache")
    session, ids, expected = open_session(open_bundle(bundle).graph, threads=1), np.arange(5, 12)[None], []
    settings = og.GeneratorParams(model := og.Model(str(bundle)))
    settings.set_search_options(max_length=7 + 8, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(ids.astype(np.int32))
    found = []
    for _ in range(8):
        expected.append(int(session.run(ids)[0, -1].argmax()))
        ids = np.array([expected[-1:]], dtype=np.int64)
        if not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
    assert found == expected[: len(found)]
    assert len(found) == 8 or found[-1] == 2, "it stopped without an end"


def test_inspect_shows_the_cache(built: tuple[Report, Path, Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle, recipe = built
    assert command(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key/value cache"] == "int8"
    assert command(["inspect", str(bundle / "kv_scales.json"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["scales"] == recipe.export.kv_scales
    assert 0 < shown["smallest scale"] < shown["largest scale"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-cache", "int4"], "export.kv_cache is 'int4'"),
        (["--set", "export.kv_scales=per-channel"], "export.kv_scales is 'per-channel'"),
    ],
)
def test_a_bad_recipe_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["build", "--model", "x", "--print-config", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert command(["build", "--kv-cache", "int8", "--print-config"]) == 0
    assert "\n  kv_cache: int8\n" in capsys.readouterr().out
