"""An INT8 embedding: rows and the scores of a tied head come from one tensor of codes, as numpy computes them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from cushion_deploy.core.graph_form import MIN_OPSET, GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import has_head_kernel
from cushion_deploy.engines.registry import find_engine, why_missing
from cushion_deploy.errors import UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.stages.embedding import is_exact

VOCAB, HIDDEN, BLOCK = 199, 64, 32
NAME = "model.embed_tokens.weight"


def table(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales, ``[vocab, blocks]``, of the embedding in the checkpoint."""
    rows = load_file(model.folder / "model.safetensors")[NAME].reshape(VOCAB, -1, BLOCK)
    scales = np.abs(rows).max(axis=2) / np.float32(127)
    codes = np.clip(np.rint(rows / scales[:, :, None]), -128, 127).astype(np.int8)
    return codes.reshape(VOCAB, HIDDEN), scales


def values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    blocks: np.ndarray = codes.reshape(VOCAB, -1, BLOCK) * scales[:, :, None]
    return blocks.reshape(VOCAB, HIDDEN)


@pytest.fixture(scope="module")
def export(make_model, make_scales, tmp_path_factory):
    """Return a function that exports a model with an INT8 embedding; its layers are in floating point unless told."""

    def run(
        *, tied: bool = True, head: bool = False, layers: bool = False, **form: Any
    ) -> tuple[Any, Quantization, ExportedGraph]:
        model = make_model(tie_word_embeddings=tied)
        kept = () if layers else tuple(site for site in model.sites if site != "head")
        scheme = QuantScheme(quantize_head=head, float_sites=kept, int8_embedding=True)
        prefix = model.compute_prefix((7, 1, 100))
        quantization = Quantization(prefix, scheme, make_scales(model, prefix))
        folder = tmp_path_factory.mktemp("graph")
        return model, quantization, export_graph(model.spec, model.weights, quantization, GraphForm(**form), folder)

    return run


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(3, VOCAB, (1, 20))


def tensors(graph: ExportedGraph) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(graph.path).graph.initializer}


def test_codes_and_scales_are_stored_once(export) -> None:
    model, _, graph = export()
    found, (codes, scales) = tensors(graph), table(model)
    np.testing.assert_array_equal(found[f"{NAME}_codes"], codes)
    assert found[f"{NAME}_codes"].dtype == np.int8
    np.testing.assert_array_equal(found[f"{NAME}_scales"], scales)
    assert found[f"{NAME}_scales"].dtype == np.float32
    assert [name for name, a in found.items() if a.size == VOCAB * HIDDEN] == [f"{NAME}_codes"]
    assert [name for name, a in found.items() if a.size == VOCAB * HIDDEN // BLOCK] == [f"{NAME}_scales"]
    onnx.checker.check_model(graph.path, full_check=True)


def test_a_q8_0_table_is_kept_code_by_code_with_scales_of_16_bits(make_model, make_scales, runner, tmp_path) -> None:
    """The reference quantizer of GGUF is the oracle: its codes and scales are those of the graph."""
    model = make_model(tie_word_embeddings=True)
    packed = gguf.quants.quantize(load_file(model.folder / "model.safetensors")[NAME], gguf.GGMLQuantizationType.Q8_0)
    blocks = packed.reshape(VOCAB, HIDDEN // BLOCK, 2 + BLOCK)
    rows = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    weights = Replaced(model.weights, rows)
    assert is_exact(weights, NAME)
    assert not is_exact(model.weights, NAME)
    scheme = QuantScheme(quantize_head=False, int8_embedding=True)
    prefix = model.compute_prefix((7,))
    quantization = Quantization(prefix, scheme, make_scales(model, prefix))
    found = tensors(export_graph(model.spec, weights, quantization, GraphForm(), tmp_path))
    np.testing.assert_array_equal(found[f"{NAME}_codes"].reshape(VOCAB, -1, BLOCK), blocks[:, :, 2:].view(np.int8))
    np.testing.assert_array_equal(found[f"{NAME}_scales"], blocks[:, :, :2].copy().view(np.float16)[:, :, 0])
    assert found[f"{NAME}_scales"].dtype == np.float16


class Replaced:
    """Weights of a model with another token embedding."""

    def __init__(self, weights: Any, rows: np.ndarray) -> None:
        self.names, self.shape, self._weights, self._rows = weights.names, weights.shape, weights, rows

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        found: np.ndarray = self._rows[start:stop] if name == NAME else self._weights.rows(name, start, stop)
        return found


@pytest.mark.parametrize("form", [{"gathers_codes": False}, {"dtype": "float16"}, {"dtype": "bfloat16"}])
def test_graphs_for_tensorrt_have_the_dequantized_table(form: dict[str, Any], export) -> None:
    model, _, graph = export(**form)
    (found,) = (a for name, a in tensors(graph).items() if name.startswith(NAME))
    np.testing.assert_array_equal(found, values(*table(model)).astype(found.dtype))
    assert not graph.int8_embedding
    assert graph.opset == MIN_OPSET


def test_rows_that_are_no_multiple_of_a_block_are_refused_before_a_file_is_written(
    make_model, make_scales, tmp_path
) -> None:
    model = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    prefix = model.compute_prefix((7,))
    assert not is_exact(model.weights, NAME)
    quantization = Quantization(prefix, QuantScheme(int8_embedding=True), make_scales(model, prefix))
    with pytest.raises(UsageError, match=r"blocks of 32 values, and rows of this model have 48"):
        export_graph(model.spec, model.weights, quantization, GraphForm(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_quantized_head_has_codes_of_its_own(export) -> None:
    model, _, graph = export(head=True)
    weights = load_file(model.folder / "model.safetensors")[NAME]
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    found = tensors(graph)
    np.testing.assert_array_equal(found["head.weight_codes"], np.rint(weights / scales[:, None]).T.astype(np.int8))
    np.testing.assert_array_equal(found["head.weight_scales"], scales)
    np.testing.assert_array_equal(found[f"{NAME}_codes"], table(model)[0])


def test_an_untied_head_stays_as_it_is(export) -> None:
    model, _, graph = export(tied=False)
    weights = load_file(model.folder / "model.safetensors")
    np.testing.assert_array_equal(tensors(graph)["head.weight"], weights["lm_head.weight"].T)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_with_the_rounded_table(
    tied: bool, export, transformers_logits, runner, ids
) -> None:
    model, _, graph = export(tied=tied)
    codes, scales = table(model)
    embedding = model.module.get_submodule("model.embed_tokens")
    original = embedding.weight.clone()
    prefix = model.compute_prefix((7, 1, 100))
    past = model.past(prefix)
    try:
        embedding.weight.copy_(torch.tensor(values(codes, scales)))
        with torch.inference_mode():
            expected = model.run(torch.tensor(ids), past).logits.numpy()
    finally:
        embedding.weight.copy_(original)
    logits, _ = literal(runner, graph)(ids)
    assert np.abs(logits - expected).max() <= 1e-4
    with torch.inference_mode():
        unrounded = model.run(torch.tensor(ids), past).logits.numpy()
    assert np.abs(unrounded - expected).max() > 100 * 1e-4, "rounding must be visible"


def literal(runner: Any, graph: ExportedGraph) -> Any:
    """Return a runner of a graph that executes every node as the ONNX specification defines it."""
    found, options = runner(graph.path), ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found.session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    return found


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_simulation_computes_what_the_graph_computes(
    head: bool, tied: bool, gathers: bool, export, runner, ids
) -> None:
    model, quantization, graph = export(head=head, tied=tied, gathers_codes=gathers)
    with simulated(model, quantization.scheme, quantization.scales):
        expected = model.logits(ids, quantization.prefix)
    logits, _ = literal(runner, graph)(ids)
    # A code of the head's input that flips at a tie moves logits by its scale times a weight.
    close = np.abs(logits - expected) <= (0.05 if head else 1e-4)
    assert close.all()


def test_the_float_twin_has_a_float_embedding(export, tmp_path) -> None:
    model, quantization, _ = export()
    form = GraphForm(quantized=False)
    twin = export_graph(model.spec, model.weights, quantization.float_twin, form, tmp_path)
    assert not twin.int8_embedding
    assert tensors(twin)[NAME].dtype == np.float32


@pytest.mark.skipif(not has_head_kernel(), reason="this ONNX Runtime has no kernel for the head")
@pytest.mark.parametrize("uint8", ["0", "1"])
def test_onnxruntime_fuses_the_tied_head_and_no_float_copy_of_the_table_remains(
    uint8: str, export, runner, ids, tmp_path
) -> None:
    _, _, graph = export()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", uint8)
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    kernels = [n for n in optimized.node if n.op_type == "MatMulNBits"]
    assert [{a.name: a.i for a in n.attribute}["accuracy_level"] for n in kernels] == [4]
    large = [t for t in optimized.initializer if np.prod(t.dims) >= VOCAB * HIDDEN]
    assert {t.data_type for t in large} == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    fusing = runner(graph.path)
    fusing.session = session
    fused, _ = fusing(ids)
    exact, _ = literal(runner, graph)(ids)
    # Its activations have 8 bits, but get them in two parts: one would be off by 2^-9 to 2^-7.
    assert np.abs(fused - exact).max() <= 2**-12 * np.abs(exact).max()


def test_a_token_of_zeros_has_logits_of_zero(export, runner, ids, make_model) -> None:
    """No block of zeros divides by its largest value."""
    _, _, graph = export()
    model = onnx.load(graph.path)
    (norm,) = (t for t in model.graph.initializer if t.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.zeros(HIDDEN, np.float32), norm.name))
    path = graph.path.with_name("zeros.onnx")
    onnx.save(model, path)
    logits, _ = runner(path)(ids)
    np.testing.assert_array_equal(logits, np.zeros_like(logits))


def test_a_prompt_may_ask_for_no_logits(export, runner, ids) -> None:
    _, _, graph = export(layers=True)
    logits, past = runner(graph.path)(ids, logits_start=np.array([20]))
    assert logits.shape == (1, 0, VOCAB)
    whole, _ = runner(graph.path)(ids)
    last, _ = runner(graph.path)(ids, logits_start=np.array([19]))
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-4)
    assert past["past_key_values.0.key"].shape[2] == 20


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_linear_is_int8_in_an_engine_with_or_without_the_head(
    engine: str, head: bool, export, ids: np.ndarray, tmp_path
) -> None:
    chosen = find_engine(engine)
    if (missing := why_missing(chosen)) is not None:
        pytest.skip(missing.message)
    if engine == "onnxruntime" and not has_head_kernel():
        pytest.skip("this ONNX Runtime has no kernel for the head")
    _, _, graph = export(head=head, layers=True)
    artifact = chosen.compile(graph, tmp_path, CompileOptions())
    assert artifact.int8_linears == artifact.linears == graph.linears
    literal = open_session(graph, fused=False).run(ids, need_logits="all")
    found = chosen.open(graph).run(ids, need_logits="all")
    # A code of an activation may be rounded the other way.
    np.testing.assert_allclose(found, literal, atol=0.02 * np.abs(literal).max())
