"""The observer counts text tokens alone, refuses what has no scale, and names Site and batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cushion_deploy.calib.calibrate import SiteObserver, choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

SITE = Site("layers.1.mlp.down")


def text_maxima(model: TorchRunner, before: tuple[int, ...], rows: list[IntArray]) -> dict[str, float]:
    """Return the largest magnitude of the text tokens at every Site, each row run alone by transformers."""
    found = dict.fromkeys(model.sites, 0.0)

    def hook(site: Site) -> Any:
        def take(_: Any, args: tuple[torch.Tensor, ...], __: Any) -> None:
            found[site] = max(found[site], float(args[0][0, len(before) :].abs().max()))

        return take

    handles = [linears[0].register_forward_hook(hook(site)) for site, linears in model.sites.items()]
    with torch.inference_mode():
        for row in rows:
            model.module(input_ids=torch.tensor([[*before, *row.tolist()]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("tokens", [(), (65,), (7, 1)])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_maxima_are_those_of_the_text_tokens(
    planted_model: TorchRunner, plain_ids: IntArray, tokens: tuple[int, ...], batch_size: int
) -> None:
    rows = [plain_ids[:20], plain_ids[30:43], plain_ids[50:51]]
    # Absorbers as padding: counted, they would be by far the largest.
    ids, mask = np.full((3, 20), 65), np.zeros((3, 20), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    prefix = planted_model.compute_prefix(tokens)
    histograms = observe_sites(planted_model, prefix, ids, mask, batch_size=batch_size)
    assert list(histograms) == list(planted_model.sites)
    expected = text_maxima(planted_model, tokens, rows)
    for site, histogram in histograms.items():
        assert histogram.amax == pytest.approx(expected[site], rel=1e-3), site
        features = planted_model.sites[site][0].in_features
        assert histogram.counts.sum() == (20 + 13 + 1) * features


def test_the_batch_size_does_not_change_the_histograms(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    ids = plain_ids[:120].reshape(6, 20)
    prefix = Prefix.empty(tiny_model.spec)
    one, other = (observe_sites(tiny_model, prefix, ids, np.ones_like(ids), batch_size=n) for n in (1, 4))
    for site in one:
        assert one[site].limit == other[site].limit
        # Another batch shape may round a value into the next bin, no more.
        assert np.abs(np.cumsum(one[site].counts) - np.cumsum(other[site].counts)).max() <= 8


def test_counts_are_numpys(tiny_model: TorchRunner) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    observer = SiteObserver(mask)
    observer(SITE, x)
    histogram = observer.histograms[SITE]
    values = np.abs(x.numpy()[mask.numpy()]).ravel()
    assert histogram.amax == float(values.max())
    expected, _ = np.histogram(values, bins=len(histogram.counts), range=(0, histogram.limit))
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= 1
    assert histogram.counts.sum() == 8 * 7


@pytest.mark.parametrize("sign", [1, -1])
def test_the_signed_range_is_that_of_text_tokens_over_all_batches(sign: int) -> None:
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    x[0, 1, 4, 0], x[2, 0, 1, 3] = 30.0 * sign, -20.0 * sign
    x[:, 0, 3:] = 100.0 * sign
    observer = SiteObserver(mask)
    for batch in x:
        observer(SITE, batch)
    histogram = observer.histograms[SITE]
    assert (histogram.low, histogram.high) == ((-20.0, 30.0) if sign > 0 else (-30.0, 20.0))
    assert histogram.amax == 30.0


def test_zero_counts_as_seen_where_all_values_have_one_sign() -> None:
    observer = SiteObserver(torch.ones(1, 2, dtype=torch.bool))
    observer(SITE, torch.tensor([[[2.0], [3.0]]]))
    assert (observer.histograms[SITE].low, observer.histograms[SITE].high) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinity"),
        (float("inf"), "NaN or infinity"),
        (float("-inf"), "NaN or infinity"),
        (0.0, "zero or subnormal"),
        (1e-40, "zero or subnormal"),
    ],
)
def test_values_without_a_scale_are_refused_by_site_and_batch(value: float, words: str) -> None:
    observer = SiteObserver(torch.ones(2, 3, dtype=torch.bool), batch=7)
    x = torch.ones(2, 3, 4) if not np.isfinite(value) else torch.zeros(2, 3, 4)
    x[1, 2, 3] = value
    with pytest.raises(UsageError, match=rf"Site layers\.1\.mlp\.down, calibration batch 7: .*{words}") as e:
        observer(SITE, x)
    assert "checkpoint" in e.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_padding_is_masked_before_anything_is_looked_at(value: float) -> None:
    observer = SiteObserver(torch.tensor([[True, True, False]]))
    x = torch.ones(1, 3, 4)
    x[0, 2] = value
    observer(SITE, x)
    assert observer.histograms[SITE].amax == 1.0


def test_a_model_that_overflows_is_refused_where_it_does(
    tiny_folder: Path, tmp_path: Path, plain_ids: IntArray
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_folder(folder, resolve_source(str(folder)))
    ids = plain_ids[:20].reshape(2, 10)
    with pytest.raises(UsageError, match=r"Site layers\.1\.mlp\.down, calibration batch 0"):
        observe_sites(model, Prefix.empty(model.spec), ids, np.ones_like(ids))


def test_a_dead_input_is_refused_where_it_is(tiny_folder: Path, tmp_path: Path, plain_ids: IntArray) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_folder(folder, resolve_source(str(folder)))
    ids = plain_ids[:20].reshape(2, 10)
    with pytest.raises(UsageError, match=r"Site layers\.2\.attn\.out"):
        observe_sites(model, Prefix.empty(model.spec), ids, np.ones_like(ids))


def test_scales_map_the_threshold_to_the_largest_code_and_name_their_parents(
    tiny_model: TorchRunner, plain_ids: IntArray
) -> None:
    ids = plain_ids[:40].reshape(2, 20)
    prefix = tiny_model.compute_prefix((7,))
    histograms = observe_sites(tiny_model, prefix, ids, np.ones_like(ids))
    scales = choose_scales(histograms, RangeEstimator("max"), tiny_model.lineage(prefix, "c"), 40)
    for site, scale in scales.scales.items():
        assert scale == float(np.float32(scale))
        assert scale == pytest.approx(histograms[site].amax / 127, rel=1e-6)
    assert isinstance(scales, ActivationScales)
    assert (scales.estimator, scales.lineage.text, scales.tokens) == ("max", "c", 40)
    assert (scales.lineage.model, scales.lineage.prefix) == (tiny_model.spec.weights_digest, prefix.digest)


def test_an_absorbing_prefix_shrinks_the_scale(planted_model: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    ids = plain_ids[:96].reshape(4, 24)
    found = {}
    for tokens in ((), plant.absorbers[:1]):
        histograms = observe_sites(planted_model, planted_model.compute_prefix(tokens), ids, np.ones_like(ids))
        found[tokens] = histograms[Site(f"layers.{plant.layer}.mlp.down")].amax
    assert found[()] > plant.massive > 2 * found[plant.absorbers[:1]]


def test_progress_counts_windows(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    ids, reports = plain_ids[:50].reshape(5, 10), []
    observe_sites(
        tiny_model,
        Prefix.empty(tiny_model.spec),
        ids,
        np.ones_like(ids),
        batch_size=2,
        progress=lambda *report: reports.append(report),
    )
    assert [done for _, done, _ in reports] == [2, 4, 5]
    assert {total for _, _, total in reports} == {5}
