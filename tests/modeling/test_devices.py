"""The device and the type of a recipe: what `auto` means, what is refused, and that results agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.processes import Processes
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.devices import resolve_device, resolve_dtype, weight_memory
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.source import resolve_source, stored_dtype
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.prefix.tune import PrefixTuning
from cushion_deploy.recipe import Compute, Search, Tuning

CLOSE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Largest relative difference of a scale (by the maximum) and of the root mean square of a prefix's keys and values."""


def test_auto_is_the_accelerator_that_is_there() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:77", "mps", "cuda"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there.get(name):
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UsageError) as e:
        resolve_device(name)
    assert name.partition(":")[0] in e.value.message
    assert "cpu" in e.value.hint


def test_processes_of_one_machine_share_its_memory_and_each_needs_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cushion_deploy.modeling.devices.free_memory", lambda: 10 << 30)
    cpu, four = torch.device("cpu"), Processes(0, 4, 0, 4)
    assert weight_memory(Compute(), cpu, four) == weight_memory(Compute(), cpu) // 4 == int(0.8 * (10 << 30)) // 4
    assert weight_memory(Compute(memory=1.5), cpu, four) == 3 << 29
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", Processes(1, 2, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="4 processes cannot share device 'auto'"):
        resolve_device("auto", four)
    with pytest.raises(UsageError, match="all 2 processes cannot share device 'cuda:0'"):
        resolve_device("cuda:0", Processes(1, 2, 1, 2))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float8_e4m3fn"}, "float32"),
        ({}, "float32"),
    ],
)
def test_the_stored_type_is_that_of_the_configuration(config: dict[str, str], expected: str) -> None:
    assert stored_dtype(config) == expected


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert resolve_dtype(Compute(device="cpu"), "bfloat16") == "float32"
    assert resolve_dtype(Compute(device="cpu", dtype="float16"), "bfloat16") == "float16"


@pytest.fixture
def bfloat16_folder(tiny_writer: Callable[..., Path], sink_planter: Callable[..., None], tmp_path: Path) -> Path:
    """Return a model with a planted sink whose weights are stored in bfloat16."""

    def edit(module: torch.nn.Module) -> None:
        sink_planter(module)
        module.to(torch.bfloat16)

    return tiny_writer(tmp_path / "bf16", edit)


def measured(model: TorchRunner, ids: IntArray) -> tuple[Prefix, ActivationScales]:
    """Return the prefix of an absorber, and the scales behind it."""
    prefix = model.compute_prefix((97,))
    histograms = observe_sites(model, prefix, ids, np.ones_like(ids))
    return prefix, choose_scales(histograms, RangeEstimator("max"), model.lineage(prefix), ids.size)


def require_close(
    found: tuple[Prefix, ActivationScales], expected: tuple[Prefix, ActivationScales], dtype: str
) -> None:
    """Check that prefix and scales agree within the stated tolerance."""
    for one, other in ((found[0].keys, expected[0].keys), (found[0].values, expected[0].values)):
        assert np.sqrt(np.mean((one - other) ** 2)) <= CLOSE[dtype] * np.sqrt(np.mean(other**2))
    assert found[1].scales.keys() == expected[1].scales.keys()
    for site, scale in expected[1].scales.items():
        assert found[1].scales[site] == pytest.approx(scale, rel=CLOSE[dtype]), site


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bits_give_nearly_the_same_prefix_and_scales(
    dtype: str, bfloat16_folder: Path, plain_ids: IntArray
) -> None:
    source, ids = resolve_source(str(bfloat16_folder)), plain_ids[:128].reshape(4, 32)
    assert source.dtype == "bfloat16"
    exact = load_folder(bfloat16_folder, source)
    rough = load_folder(bfloat16_folder, source, compute=Compute(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    assert {str(p.dtype) for p in rough.module.parameters()} == {f"torch.{dtype}"}
    require_close(measured(rough, ids), measured(exact, ids), dtype)


@pytest.mark.parametrize("memory", [None, 1e-6])
def test_a_model_can_visit_the_cpu(tiny_folder: Path, plain_ids: IntArray, memory: float | None) -> None:
    """From the only other device that every machine has, which has no numbers: meta."""
    compute, ids = Compute(device="cpu", dtype="float32", memory=memory), plain_ids[None, :16]
    model = load_folder(tiny_folder, resolve_source(str(tiny_folder)), compute=compute)
    assert bool(model.placed.streamed_layers) is (memory is not None)
    expected, meta = model.logits(ids, model.no_prefix()), torch.device("meta")
    buffers = dict(model.module.named_buffers())
    model.placed._move(meta)
    for name, buffer in buffers.items():  # which no checkpoint has
        set_module_tensor_to_device(model.module, name, "cpu", value=buffer)
    with model.placed.on_cpu():
        assert model.device == torch.device("cpu")
        np.testing.assert_array_equal(model.logits(ids, model.no_prefix()), expected)
    assert model.device == meta
    assert {tensor.device for tensor in (*model.module.parameters(), *model.module.buffers())} == {meta}


@pytest.fixture
def gpu(bfloat16_folder: Path) -> Callable[..., TorchRunner]:
    """Return a function that loads the model on the first GPU; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("not run: no GPU")
    source = resolve_source(str(bfloat16_folder))
    return lambda **compute: load_folder(bfloat16_folder, source, compute=Compute(device="cuda", **compute))


@pytest.mark.gpu
def test_a_gpu_searches_simulates_and_tunes_as_a_cpu_does(
    gpu: Callable[..., TorchRunner], bfloat16_folder: Path, plain_ids: IntArray
) -> None:
    exact = load_folder(bfloat16_folder, resolve_source(str(bfloat16_folder)))
    settings = Search(text_tokens=64, random_candidates=8, screen_candidates=8, gradient_candidates=8, audit_tokens=4)
    windows = plain_ids[:128].reshape(4, 32)
    results = []
    for model in (exact, gpu(dtype="float32"), gpu(dtype="float32", memory=0.0)):
        prefix, trace = PrefixSearch(model, plain_ids, settings).run()
        _, scales = measured(model, windows)
        with simulated(model, QuantScheme(), scales):
            losses = model.token_nll(windows, model.compute_prefix((97,)))
        start = Quantization(model.compute_prefix((97,)), QuantScheme(), scales)
        config = Tuning(epochs=1, batch=3, microbatch=3)
        tuned = PrefixTuning(model, start, windows[:3], windows[3:], config).run()[0]
        results.append((prefix.token_ids, trace.steps[0].ratio, losses, tuned))
    for ids, ratio, losses, tuned in results[1:]:
        assert ids == results[0][0]
        assert ratio == pytest.approx(results[0][1], rel=1e-2)
        np.testing.assert_allclose(losses.mean(), results[0][2].mean(), rtol=1e-3)
        np.testing.assert_allclose(tuned.keys, results[0][3].keys, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_gives_the_prefix_and_the_scales_of_a_cpu(
    dtype: str, gpu: Callable[..., TorchRunner], bfloat16_folder: Path, plain_ids: IntArray
) -> None:
    ids = plain_ids[:128].reshape(4, 32)
    exact, model = load_folder(bfloat16_folder, resolve_source(str(bfloat16_folder))), gpu(dtype=dtype)
    assert {p.device.type for p in model.module.parameters()} == {"cuda"}
    require_close(measured(model, ids), measured(exact, ids), dtype)
