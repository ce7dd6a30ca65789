"""CUDA without a driver; and the stand-ins for CUDA and TensorRT offer nothing that the real libraries do not."""

from __future__ import annotations

import importlib

import pytest
from fake_gpu import Context, Engine, FakeCuda, FakeTensorRt, RuntimeConfig
from fake_graphs import FakeGraphs, Mode

from cushion_deploy.engines.tensorrt.cuda import Cuda
from cushion_deploy.errors import MissingDependency


def test_without_a_driver_it_is_a_missing_dependency() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if open_devices():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingDependency, match="no NVIDIA GPU"):
        Cuda()


def open_devices() -> int:
    api = importlib.import_module("cuda.bindings.runtime")
    status, count = api.cudaGetDeviceCount()
    return int(count) if int(status) == 0 else 0


@pytest.mark.parametrize(
    ("fake", "real"),
    [(Engine, "ICudaEngine"), (Context, "IExecutionContext"), (RuntimeConfig, "IRuntimeConfig")],
)
def test_the_fake_offers_nothing_that_tensorrt_does_not(fake: type, real: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert {name for name in vars(fake) if not name.startswith("_")} <= set(dir(getattr(trt, real)))
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    module = FakeTensorRt(FakeCuda())
    for name in ("ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        assert {member.name for member in getattr(module, name)} == set(getattr(trt, name).__members__)


def test_the_fake_offers_nothing_that_cuda_does_not() -> None:
    api = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert {name for name in (*vars(FakeCuda), *vars(FakeGraphs)) if name.startswith("cuda")} <= set(dir(api))
    assert {mode.name: mode.value for mode in Mode} == {m.name: m.value for m in api.cudaStreamCaptureMode}
