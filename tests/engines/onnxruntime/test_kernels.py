"""The setting of exact integer kernels is found by trying them, against integer arithmetic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from cushion_deploy.engines.one_linear import one_head, one_linear
from cushion_deploy.engines.onnxruntime import kernels
from cushion_deploy.engines.onnxruntime.kernels import (
    FLOAT_HEAD,
    HEAD_ACTIVATIONS,
    INT8_HEAD,
    UINT8_WEIGHTS,
    WAYS,
    adds_exactly,
    exact_kernels,
    head_adds_exactly,
    kernels_in_words,
)
from cushion_deploy.engines.onnxruntime.settings import has_head_kernel
from cushion_deploy.errors import CheckFailed


@pytest.fixture
def untried() -> Iterator[None]:
    """Forget the verdict of this process before and after a test."""
    exact_kernels.cache_clear()
    yield
    exact_kernels.cache_clear()


def saturating(codes: Any, weights: Any) -> np.ndarray:
    """Return products as x86 without VNNI computes them (vpmaddubsw): pairs of products in saturating 16 bits."""
    shifted = codes.astype(np.int32) + 128
    pairs = (shifted[:, :, None] * weights[None].astype(np.int32)).reshape(len(codes), -1, 2, weights.shape[1]).sum(2)
    sums = np.clip(pairs, -(2**15), 2**15 - 1).sum(1)
    return np.asarray(sums - 128 * weights.astype(np.int64).sum(0), dtype=np.float32)


@pytest.mark.parametrize("shape", [(4, 3), (256, 80), (130, 200)])
def test_the_bytes_are_a_valid_model_of_one_linear(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, shape, dtype=np.int8)
    model = onnx.load_from_string(one_linear(weights))
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["w"], weights)
    x = rng.integers(-127, 128, (5, shape[0])).astype(np.float32)
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(found, x @ weights.astype(np.float32))


def test_the_bytes_are_a_valid_model_of_one_head() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (64, 7), dtype=np.int8)
    model = onnx.load_from_string(one_head(weights, 32))
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, len(node.input)) for node in model.graph.node] == [
        ("Transpose", 1),
        ("DequantizeLinear", 3),
        ("MatMul", 2),
    ], "as an exported head: the codes are a table of rows, and zero points are written out"
    x = rng.integers(-127, 128, (5, 64)).astype(np.float32)
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(found, x @ weights.astype(np.float32))


@pytest.mark.skipif(not has_head_kernel(), reason="this ONNX Runtime has no kernel for the head")
@pytest.mark.parametrize("level", [INT8_HEAD, FLOAT_HEAD])
@pytest.mark.parametrize("value", WAYS)
def test_onnx_runtime_multiplies_a_head_in_the_kernel_that_the_setting_names(
    value: str, level: str, tmp_path: Any
) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(UINT8_WEIGHTS, value)
    options.add_session_config_entry(HEAD_ACTIVATIONS, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(one_head(np.ones((64, 8), np.int8), 32), options, providers=["CPUExecutionProvider"])
    (product,) = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert product.op_type == "MatMulNBits"
    assert {a.name: a.i for a in product.attribute}["accuracy_level"] == int(level)


@pytest.mark.parametrize(
    ("version", "expected"), [("1.24.4", False), ("1.25.0", True), ("1.31.1", True), ("2.0", True)]
)
def test_the_kernel_of_a_head_is_known_by_the_version(
    version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert has_head_kernel() is expected


@pytest.mark.parametrize("value", WAYS)
def test_onnx_runtime_multiplies_it_in_the_integer_kernel(value: str, tmp_path: Any) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(UINT8_WEIGHTS, value)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(one_linear(np.ones((64, 8), np.int8)), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    (product,) = (node for node in optimized.node if node.op_type == "MatMulIntegerToFloat")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in optimized.initializer}
    assert stored[product.input[4]].dtype == np.uint8, "the zero point of the activation"


def test_sessions_still_flush_subnormals_in_a_process_that_tried_its_kernels_first(tiny: Any) -> None:
    """ONNX Runtime applies it to the calling thread only through the first session, which is now that of the test."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from cushion_deploy.engines.onnxruntime.kernels import exact_kernels\n"
        "from cushion_deploy.engines.onnxruntime.settings import SessionSettings, session_options\n"
        "import onnxruntime\n"
        "exact_kernels()\n"
        "options = session_options(SessionSettings(threads=1))\n"
        "onnxruntime.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(float(np.array([1e-39], np.float32)[0] * np.float32(0.5)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny.plain.path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) == 0.0


@pytest.mark.usefixtures("untried")
def test_what_is_chosen_here_is_exact_and_the_first_that_is() -> None:
    found = exact_kernels()
    assert adds_exactly(found[UINT8_WEIGHTS])
    assert found[UINT8_WEIGHTS] == "0" or not adds_exactly("0")
    assert (found[HEAD_ACTIVATIONS] == INT8_HEAD) is head_adds_exactly(found[UINT8_WEIGHTS])
    assert "exact in a test" in kernels_in_words()


def products_with(
    multiply: dict[tuple[str, ...], Callable[[Any, Any], np.ndarray]],
) -> Callable[..., Iterator[tuple[Any, Any]]]:
    """Return a replacement of the run in ONNX Runtime: what it computes of the same codes with the values of settings.

    Those of a head are :data:`UINT8_WEIGHTS`, :data:`HEAD_ACTIVATIONS`; those of a linear the first of them.
    """

    def products(weights: Any, model: bytes, config: dict[str, str]) -> Iterator[tuple[Any, Any]]:
        codes = np.full((2, len(weights)), 127, dtype=np.int8)
        yield codes, multiply[tuple(config.values())](codes, weights)

    return products


def exact(codes: Any, weights: Any) -> np.ndarray:
    """Return the products of integer arithmetic."""
    return (codes.astype(np.int64) @ weights.astype(np.int64)).astype(np.float32)


@pytest.mark.usefixtures("untried")
def test_a_processor_that_saturates_gets_uint8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {("0",): saturating, ("1",): exact, ("0", INT8_HEAD): saturating, ("1", INT8_HEAD): saturating}
    monkeypatch.setattr(kernels, "_products", products_with(found))
    assert exact_kernels() == {UINT8_WEIGHTS: "1", HEAD_ACTIVATIONS: FLOAT_HEAD}
    assert "in which uint8 activations x int8 weights was not" in kernels_in_words()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(("linear", "head"), [("0", FLOAT_HEAD), ("1", INT8_HEAD)])
def test_a_head_is_tried_with_the_weights_of_the_sessions(
    linear: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting for the weights of linears applies to the whole session: only its chosen value counts for a head."""
    found = {("0",): exact if linear == "0" else saturating, ("1",): exact}
    found |= {("0", INT8_HEAD): saturating, ("1", INT8_HEAD): exact}
    monkeypatch.setattr(kernels, "_products", products_with(found))
    assert exact_kernels() == {UINT8_WEIGHTS: linear, HEAD_ACTIVATIONS: head}


@pytest.mark.usefixtures("untried")
def test_a_processor_that_is_never_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_products", products_with({("0",): saturating, ("1",): saturating}))
    with pytest.raises(CheckFailed, match="whatever the setting"):
        exact_kernels()


@pytest.mark.usefixtures("untried")
def test_the_kernels_are_tried_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(kernels, "adds_exactly", lambda value: tried.append(value) or True)
    monkeypatch.setattr(kernels, "head_adds_exactly", lambda value: tried.append(f"head {value}") or True)
    assert exact_kernels() == exact_kernels() == {UINT8_WEIGHTS: "0", HEAD_ACTIVATIONS: INT8_HEAD}
    assert tried == ["0", "head 0"]
