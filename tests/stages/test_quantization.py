"""What is deployed follows the recipe: smoothing, float Sites by name or by cost, tuning; each kept and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from one_run import OneRun
from safetensors.numpy import load_file, save_file

from cushion_deploy.core.artifacts import SMOOTHING_FILE, write_smoothing
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.evaluate.chat import ANSWER_TOKENS
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.parity.limits import TIED_HEAD_LOGITS
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.report import merge_times

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.seed_tokens": ["a"],
    "search.max_length": 1,
    "search.ship": "always",
    "search.text_tokens": 64,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 64,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
    "tuning.windows": 4,
    "tuning.held_out": 2,
    "tuning.window": 32,
    "tuning.epochs": 2,
    "tuning.batch": 2,
    "tuning.judge_every": 1,
}


MakeRun = Callable[..., OneRun]


@pytest.fixture
def one_run(planted_folder: Path, tmp_path: Path) -> MakeRun:
    """Return a function that makes a run on the same work folder."""
    (tmp_path / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 30)
    (tmp_path / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    data = {"calibration.data": str(tmp_path / "calib.txt"), "evaluation.data": str(tmp_path / "eval.txt")}

    def make(**more: object) -> OneRun:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        recipe = Recipe().merged({"model": str(planted_folder), **data, **SETTINGS, **changes})
        return OneRun.of(recipe, tmp_path / "work")

    return make


def test_sites_named_and_sites_that_cost_most_stay_in_float(one_run: MakeRun) -> None:
    one = one_run()
    costs = one.costs
    assert list(costs) == [site for site in one.model.sites if site != HEAD_SITE]
    worst = sorted(costs, key=lambda site: -costs[site])
    chosen = one_run(export__keep_float=["auto:2", worst[0]]).quantization.scheme.float_sites
    assert set(chosen) == set(worst[:3])
    assert list(chosen) == [site for site in costs if site in chosen], "in the order of the computation"


def test_the_cost_of_a_site_is_the_divergence_when_it_alone_is_quantized(one_run: MakeRun) -> None:
    one = one_run()
    quantization, costs = one.quantization, one.costs
    prefix = quantization.prefix
    site = max(costs, key=lambda s: costs[s])
    model = one.model.folded(quantization.smoothing)
    ids = one.model.encode(one.run.get(one.pipeline.text).text)
    window = 256 - prefix.length
    rows = ids[: len(ids) // window * window].reshape(-1, window)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(2, len(rows))).astype(int))]
    others = tuple(other for other in costs if other != site)
    with simulated(model, QuantScheme(quantize_head=False, float_sites=others), quantization.scales):
        quantized = model.logits(rows, prefix)[:, :-1].astype(np.float64)
    plain = model.logits(rows, prefix)[:, :-1].astype(np.float64)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(plain), log_softmax(quantized)
    assert costs[site] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("entry", "message"), [("layers.9.attn.qkv", "not a quantized Site"), ("auto:x", "auto:x"), ("auto:0", "auto:0")]
)
def test_an_entry_that_cannot_be_met_is_refused(one_run: MakeRun, entry: str, message: str) -> None:
    one = one_run(export__keep_float=[entry])
    with pytest.raises(UsageError, match=message):
        one.quantization  # noqa: B018 - it is computed


def test_tuning_hands_on_its_prefix_and_scales_and_is_reused(one_run: MakeRun) -> None:
    settings = {"tuning__enabled": True, "tuning__loss": "distill", "tuning__learning_rate": 0.01}
    one = one_run(**settings)
    found, searched = one.quantization, one.run.get(one.pipeline.prefix)
    trace = one.run.get(one.pipeline.quantized.tuning).trace
    assert trace is not None
    assert trace.states[0].step == 0
    assert found.static_scales.lineage.prefix == found.prefix.digest
    moved = trace.best.step > 0
    assert np.array_equal(found.prefix.keys, searched.keys) is not moved
    untuned = one.run.get(one.pipeline.behind(one.pipeline.prefix, tuned=False).quantization)
    assert np.array_equal(untuned.prefix.keys, searched.keys)
    again = one_run(**settings)
    np.testing.assert_array_equal(again.quantization.prefix.keys, found.prefix.keys)
    assert all(row["reused"] for row in merge_times(again.run.times) if row["stage"] != "load")


def test_an_invisible_prefix_ships_with_smoothing_and_scales_of_its_own(one_run: MakeRun, tmp_path: Path) -> None:
    one = one_run(tuning__enabled=True, tuning__learning_rate=0.1)
    branch, found = one.pipeline.quantized, one.quantization
    assert branch.tuning is not None
    assert branch.smoothing is not None
    trace = one.run.get(branch.tuning).trace
    assert trace is not None
    assert trace.best.step > 0
    # The same as for a prefix from a file.
    given = one_run().pipeline.behind(Given(found.prefix))
    alone = one.run.get(given.quantization)
    assert (alone.prefix.digest, alone.scales, alone.scheme) == (found.prefix.digest, found.scales, found.scheme)
    assert alone.smoothing is not None
    assert found.smoothing is not None
    assert alone.smoothing.digest == found.smoothing.digest
    # The searched prefix can be had beside it, as it would ship.
    searched = one.run.get(one.pipeline.behind(one.pipeline.prefix, tuned=False).quantization)
    assert searched.smoothing is not None
    assert searched.smoothing.digest != found.smoothing.digest
    assert searched.static_scales.lineage.prefix == searched.prefix.digest != found.prefix.digest
    # The scales that it was tuned with are others, and the report shows those that ship.
    assert one.run.get(branch.tuning).scales.scales == searched.static_scales.scales
    report = one.build(tmp_path / "out")
    assert report.calibration is not None
    assert {site.site: site.scale for site in report.calibration.sites} == found.static_scales.scales


@pytest.mark.parametrize("scales", [False, True])
def test_prefix_and_scales_ship_as_the_pair_that_was_judged(one_run: MakeRun, scales: bool) -> None:
    one = one_run(tuning__enabled=True, tuning__loss="distill", tuning__scales=scales, tuning__learning_rate=0.05)
    found, tuning = one.quantization, one.pipeline.quantized.tuning
    assert tuning is not None
    trace = one.run.get(tuning).trace
    assert trace is not None
    assert trace.best.step > 0
    untuned = one.run.get(one.pipeline.behind(one.pipeline.prefix, tuned=False).quantization)
    assert (found.static_scales.scales == untuned.static_scales.scales) is not scales
    assert found.static_scales.lineage.prefix == found.prefix.digest
    # Judged on the first and the last of six windows that are spread over the text: measured here as evaluations are.
    ids = one.model.encode(one.run.get(one.pipeline.text).text)
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    teacher = Teacher(one.model)
    teacher.remember(rows[[0, -1]])
    model = one.model.folded(found.smoothing)
    with simulated(model, found.scheme, found.scales):
        assert teacher.compare(model, found.prefix, rows[[0, -1]]).divergence == pytest.approx(
            trace.best.whole, rel=1e-3
        )


@pytest.mark.parametrize("loss", ["invisible", "distill"])
def test_a_tuned_build_with_float_sites_holds_the_ladder(one_run: MakeRun, tmp_path: Path, loss: str) -> None:
    settings = {"tuning__enabled": True, "tuning__loss": loss, "export__keep_float": ["layers.1.mlp.down"]}
    report = one_run(**settings).build(tmp_path / "out")
    assert [row for row in report.parity if not row.passed] == []
    assert report.tuning is not None
    assert report.export is not None
    assert (report.export.float_sites, report.export.float_linears) == (("layers.1.mlp.down",), 1)
    assert report.export.linears + report.export.float_linears == 21
    (engine,) = report.engines
    assert engine.int8_linears == engine.linears == 20
    assert report.perplexity is not None
    assert report.perplexity.divergence is not None
    assert report.perplexity.divergence.fp == pytest.approx(0, abs=1e-5)
    later, errors = report.perplexity.kl_after_16, report.perplexity.kl_after_16_stderr
    assert later is not None
    assert errors is not None
    assert later.fp == pytest.approx(0, abs=1e-5)
    assert None not in (later.fp_prefix, later.quantized, later.quantized_prefix)
    assert 0 < (errors.quantized or 0) < (later.quantized or 0)
    assert report.chat is not None
    assert (report.chat.missing, report.chat.prompts) == ("", 1)
    assert report.chat.answer_tokens == ANSWER_TOKENS
    for found in (report.chat.answer, report.chat.prompt):
        assert found is not None
        assert found.fp == pytest.approx(0, abs=1e-5)
        assert (found.quantized or 0) > 0
    assert report.perplexity.engine_stderr is not None
    assert report.perplexity.stderr is not None
    assert report.perplexity.engine_stderr == pytest.approx(report.perplexity.stderr.quantized_prefix, rel=0.1)


def test_a_bundle_tells_what_it_deploys_and_foreign_smoothing_is_refused(one_run: MakeRun, tmp_path: Path) -> None:
    one = one_run(export__keep_float=["layers.1.mlp.down"])
    made, scheme = one.quantization, one.pipeline.scheme
    one.build(tmp_path / "out")
    graph = open_bundle(tmp_path / "out").graph
    read = read_quantization(tmp_path / "out", graph, scheme)
    assert (read.prefix.digest, read.scales, read.scheme) == (made.prefix.digest, made.scales, made.scheme)
    assert read.smoothing is not None
    assert made.smoothing is not None
    assert read.smoothing.digest == made.smoothing.digest
    factors = {site: 2 * factor for site, factor in made.smoothing.factors.items()}
    write_smoothing(replace(made.smoothing, factors=factors), tmp_path / "out" / SMOOTHING_FILE)
    with pytest.raises(UntrustedArtifact, match="another smoothing"):
        read_quantization(tmp_path / "out", graph, scheme)


def test_sites_are_compared_on_windows_that_fit_behind_the_prefix(one_run: MakeRun) -> None:
    one = one_run()
    assert one.model.spec.max_positions == 256
    found = one.quantization
    lengths: list[int] = []
    with observed(one.model.folded(found.smoothing), lambda _, x: lengths.append(x.shape[1])):
        one.costs  # noqa: B018 - it is computed
    assert max(lengths) + found.prefix.length <= 256


@pytest.mark.parametrize(("exact", "kernel"), [(True, True), (True, False), (False, True)])
def test_an_embedding_becomes_codes_by_itself_only_if_they_are_exact_and_have_a_kernel(
    exact: bool, kernel: bool, one_run: MakeRun, planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(planted_folder, tmp_path / "model")
    if exact:
        tensors = load_file(folder / "model.safetensors")
        blocks = tensors["model.embed_tokens.weight"].reshape(-1, 32)
        scales = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
        tensors["model.embed_tokens.weight"] = (np.rint(blocks / scales).clip(-127, 127) * scales).reshape(
            tensors["model.embed_tokens.weight"].shape
        )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("cushion_deploy.stages.pipeline.has_head_kernel", lambda: kernel)

    def chosen(**settings: object) -> bool:
        one = one_run(model=str(folder), **settings)
        return bool(one.run.get(one.pipeline.whole_scheme).int8_embedding)

    assert chosen() is (exact and kernel)
    assert chosen(export__embedding="int8")
    assert not chosen(export__embedding="float")


def test_a_build_with_an_int8_embedding_holds_the_ladder(
    one_run: MakeRun, planted_folder: Path, tmp_path: Path
) -> None:
    tied = shutil.copytree(planted_folder, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    # A head of its own in the file would be used although the configuration ties it.
    tensors = load_file(tied / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, tied / "model.safetensors")
    report = one_run(model=str(tied), export__embedding="int8").build(tmp_path / "out")
    assert [row for row in report.parity if not row.passed] == []
    (rows,) = (row for row in report.parity if row.metric == "rows of the embedding that differ")
    assert rows.value == 0
    # The kernel of a tied head rounds to 8 bits what it reads: the limit is one of its own.
    (kernels,) = (
        row for row in report.parity if row.rung == "onnxruntime kernels against fake-quant" and "logit" in row.metric
    )
    assert kernels.limit == TIED_HEAD_LOGITS
    assert kernels.value < TIED_HEAD_LOGITS / 2
    plain = one_run().build(tmp_path / "float")
    assert all("embedding" not in row.rung for row in plain.parity)
