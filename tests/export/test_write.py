"""What lies on disk after an export: exactly the model's codes, once, in a graph that the checker accepts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme, parse_scheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.export.rules import RULES
from cushion_deploy.export.write import export_graph

TOKENS = (7, 1, 100)
KINDS = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
LAYERS, HIDDEN, INNER, KV, VOCAB = 2, 64, 96, 32, 199
LINEARS = LAYERS * 7


@pytest.fixture(scope="module")
def export(make_model, make_scales, tmp_path_factory):
    """Return a function that exports the INT8 graph of a random model; every call writes anew."""

    def run(scheme: QuantScheme | None = None, model: Any = None, name: str = "model", **form: Any) -> ExportedGraph:
        model = model or make_model()
        prefix = model.compute_prefix(TOKENS)
        folder = tmp_path_factory.mktemp("graph")
        quantization = Quantization(prefix, scheme or QuantScheme(), make_scales(model, prefix))
        return export_graph(model.spec, model.weights, quantization, GraphForm(**form), folder, name=name)

    return run


def stored(graph: ExportedGraph) -> dict[str, np.ndarray]:
    """Return every initializer."""
    model = onnx.load(graph.path)
    names = [t.name for t in model.graph.initializer]
    assert len(names) == len(set(names))
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def checkpoint(model: Any) -> dict[str, np.ndarray]:
    return load_file(model.folder / "model.safetensors")


@pytest.mark.parametrize(
    ("quantized", "dtype", "opset"),
    [(True, "float32", opset) for opset in range(17, 23)]
    + [(True, "float16", 17), (True, "float16", 22), (False, "float32", 17), (False, "float16", 22)],
)
def test_the_checker_accepts_every_graph(
    quantized: bool, dtype: str, opset: int, export, export_float, make_model
) -> None:
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    model = make_model(**options)
    arguments = {"dtype": dtype, "opset": opset, "name": "other"}
    graph = export(model=model, **arguments) if quantized else export_float(model, TOKENS, **arguments)
    assert graph.path.name == "other.onnx"
    assert {p.name for p in graph.path.parent.iterdir()} == {"other.onnx", "other.onnx.data"}
    onnx.checker.check_model(graph.path, full_check=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_codes_and_scales_are_those_of_the_checkpoint(dtype: str, export, make_model) -> None:
    tensors, weights = stored(export(dtype=dtype)), checkpoint(make_model())
    wanted = {
        f"layers.{i}.{kind}": [weights[f"model.layers.{i}.{path}.weight"] for path in paths]
        for i in range(LAYERS)
        for kind, paths in KINDS.items()
    }
    wanted["head"] = [weights["lm_head.weight"]]
    for index, (site, parts) in enumerate(wanted.items()):
        whole = np.concatenate(parts)
        scale = np.abs(whole).max(axis=1) / np.float32(127)
        codes = np.clip(np.rint(whole / scale[:, None]), -128, 127)
        np.testing.assert_array_equal(tensors[f"{site}.weight_codes"], codes.T)
        assert tensors[f"{site}.weight_codes"].dtype == np.int8
        np.testing.assert_array_equal(tensors[f"{site}.weight_scales"], scale)
        assert tensors[f"{site}.weight_scales"].dtype == np.float32
        assert tensors[f"{site}.scale"] == np.float32(0.02 + 0.001 * index)
        assert not tensors[f"{site}.weight_zero_points"].any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_floating_point_is_stored_for_embedding_norms_prefix_and_float_head_alone(
    tied: bool, quantize_head: bool, export, make_model
) -> None:
    model = make_model(tie_word_embeddings=tied)
    tensors = stored(export(QuantScheme(quantize_head=quantize_head), model))
    large = {name for name, a in tensors.items() if a.dtype.kind == "f" and a.ndim > 1}
    expected = {"model.embed_tokens.weight"} | {f"prefix.{i}.{p}" for i in range(LAYERS) for p in ("key", "value")}
    if not tied and not quantize_head:
        expected.add("head.weight")
    assert large == expected
    weights = checkpoint(model)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert ("head.weight_codes" in tensors) == quantize_head
    if quantize_head and tied:
        embedding = weights["model.embed_tokens.weight"]
        scale = np.abs(embedding).max(axis=1) / np.float32(127)
        np.testing.assert_array_equal(tensors["head.weight_codes"], np.rint(embedding / scale[:, None]).T)


def test_a_tied_float_head_reads_the_embedding_itself(export_float, make_model) -> None:
    graph = onnx.load(export_float(make_model(tie_word_embeddings=True)).path).graph
    readers = [n.op_type for n in graph.node if "model.embed_tokens.weight" in n.input]
    assert sorted(readers) == ["Gather", "Gemm"]
    assert [list(t.dims) for t in graph.initializer].count([VOCAB, HIDDEN]) == 1
    assert [HIDDEN, VOCAB] not in [list(t.dims) for t in graph.initializer]


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_size_on_disk_is_that_of_the_tensors(dtype: str, width: int, export) -> None:
    graph = export(dtype=dtype)
    data = graph.path.with_name("model.onnx.data").stat().st_size
    linears = [(HIDDEN, HIDDEN + 2 * KV), (HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN)] * LAYERS
    tensors = [width * VOCAB * HIDDEN] + [width * KV * len(TOKENS)] * 2 * LAYERS + [width * HIDDEN] * (2 * LAYERS + 1)
    for inward, outward in [*linears, (HIDDEN, VOCAB)]:
        tensors += [inward * outward, 4 * outward, outward]  # codes, scales, zero points
    assert data == sum(size for size in tensors if size > 256), "smaller tensors stay inside the graph"
    model = onnx.load(graph.path, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert data == sum(np.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in outside)
    assert {i.value for t in outside for i in t.external_data if i.key == "location"} == {"model.onnx.data"}
    assert {t.name for t in outside} >= {f"layers.{i}.{k}.weight_codes" for i in range(LAYERS) for k in KINDS}
    assert graph.path.stat().st_size < 100_000


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_quantizers_stand_exactly_at_sites(dtype: str, quantize_head: bool, export) -> None:
    graph = export(QuantScheme(quantize_head=quantize_head), dtype=dtype)
    model = onnx.load(graph.path, load_external_data=False).graph
    producers = {output: n for n in model.node for output in n.output}
    consumers = Counter(name for n in model.node for name in n.input)
    sites = [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in KINDS] + ["head"] * quantize_head
    found = [n.output[0] for n in model.node if n.op_type == "QuantizeLinear"]
    assert found == [f"{site}.codes" for site in sites]
    assert all(consumers[name] == 1 for name in found)
    # One DQ for each Q, one for each weight, and each pair meets in one MatMul.
    assert sum(n.op_type == "DequantizeLinear" for n in model.node) == 2 * len(sites)
    pairs = [[producers.get(i) for i in n.input] for n in model.node if n.op_type == "MatMul"]
    quantized = [(a.input[0], b.input[0]) for a, b in pairs if a and b and a.op_type == b.op_type == "DequantizeLinear"]
    assert quantized == [(f"{site}.codes", f"{site}.weight_codes") for site in sites]
    assert graph.rules == tuple(RULES)
    assert graph.quantized
    assert list(graph.sites) == sites
    assert graph.linears == LINEARS + quantize_head


def test_the_float_twin_quantizes_nothing(export_float, make_model) -> None:
    graph = export_float(make_model(), TOKENS)
    assert not {n.op_type for n in onnx.load(graph.path).graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert not graph.quantized
    assert graph.rules == ()
    assert graph.lineage.scales == ""
    tensors, weights = stored(graph), checkpoint(make_model())
    assert not [a for a in tensors.values() if a.dtype == np.int8]
    gate_up = np.concatenate([weights[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    np.testing.assert_array_equal(tensors["layers.1.mlp.gate_up.weight"], gate_up.T)


def test_the_prefix_is_baked_in_as_it_is(export, make_model) -> None:
    prefix, tensors = make_model().compute_prefix(TOKENS), stored(export())
    for i in range(LAYERS):
        np.testing.assert_array_equal(tensors[f"prefix.{i}.key"][0], prefix.keys[i])
        np.testing.assert_array_equal(tensors[f"prefix.{i}.value"][0], prefix.values[i])


def test_equal_input_gives_equal_bytes_and_other_input_another_digest(export) -> None:
    first, second, other = export(), export(), export(QuantScheme(quantize_head=False))
    for name in ("model.onnx", "model.onnx.data"):
        assert first.path.with_name(name).read_bytes() == second.path.with_name(name).read_bytes()
    assert first.digest == second.digest != other.digest
    assert first.lineage.scheme != other.lineage.scheme


def test_the_description_survives_json(export) -> None:
    graph = export()
    again = ExportedGraph.from_json(json.loads(json.dumps(graph.to_json())), graph.path.parent)
    assert again == graph


def call(model: Any, prefix: Any, scales: Any, folder: Path, **form: Any) -> UsageError:
    def export() -> None:
        quantization = Quantization(prefix, QuantScheme(), scales)
        given = GraphForm(quantized=scales is not None, **form)
        export_graph(model.spec, model.weights, quantization, given, folder)

    with pytest.raises(UsageError) as caught:
        export()
    assert not list(folder.iterdir()), "nothing may be written"
    return caught.value


def test_parents_that_do_not_belong_together_are_refused(make_model, make_scales, tmp_path: Path) -> None:
    model, other = make_model(), make_model(num_key_value_heads=4)
    prefix = model.compute_prefix(TOKENS)
    scales = make_scales(model, prefix)
    foreign = dataclasses.replace(prefix, model_digest=other.spec.weights_digest)
    error = call(model, foreign, make_scales(other, foreign), tmp_path)
    assert (error.message, error.hint) == (
        "the prefix was made for another model",
        "run `cushion-deploy search` for this model",
    )
    assert "prefix" in call(model, foreign, None, tmp_path).message
    error = call(
        model,
        prefix,
        dataclasses.replace(scales, lineage=dataclasses.replace(scales.lineage, model="0" * 64)),
        tmp_path,
    )
    assert "scales were calibrated under another model" in error.message
    assert "calibrate" in error.hint
    error = call(model, prefix, make_scales(model, model.compute_prefix((7,))), tmp_path)
    assert "calibrated under another prefix" in error.message
    nudged = dataclasses.replace(prefix, values=prefix.values + np.float32(1e-3))
    assert "calibrated under another prefix" in call(model, nudged, scales, tmp_path).message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w8a8-per-token", "per-token dynamic"),
        ("w8a8-dynamic", "per-tensor dynamic"),
        ("w8a8-asym", "zero point"),
        ("w8a8-g32", "group of 32"),
        ("w4a8", "4-bit weights"),
    ],
)
@pytest.mark.parametrize("twin", [False, True])
def test_a_scheme_that_no_engine_runs_in_int8_is_refused_with_the_reason(
    name: str, words: str, twin: bool, make_model, make_scales, tmp_path: Path
) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    scales = None if twin else make_scales(model, prefix)
    scheme = parse_scheme(name)
    quantization, form = Quantization(prefix, scheme, scales), GraphForm(quantized=not twin)
    with pytest.raises(UsageError) as caught:
        export_graph(model.spec, model.weights, quantization, form, tmp_path)
    assert scheme.name in caught.value.message
    assert words in caught.value.message
    assert "w8a8" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_scales_of_another_kind_are_refused(make_model, make_scales, tmp_path: Path) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    scales = make_scales(model, prefix)
    zeros = dict.fromkeys(scales.scales, 0)
    assert "zero points" in call(model, prefix, dataclasses.replace(scales, zero_points=zeros), tmp_path).message
    assert "6 bits" in call(model, prefix, dataclasses.replace(scales, bits=6), tmp_path).message


def test_sites_to_keep_in_floating_point_stay_in_it(export, make_model, make_scales, tmp_path: Path) -> None:
    kept = ("layers.1.mlp.down", "layers.0.attn.qkv")
    graph = export(QuantScheme(float_sites=tuple(map(Site, kept))))
    tensors = stored(graph)
    assert not set(kept) & set(graph.sites)
    assert {name for name in tensors if name.endswith("weight_codes")} == {f"{s}.weight_codes" for s in graph.sites}
    weight = checkpoint(make_model())["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(tensors["layers.1.mlp.down.weight"], weight.T)
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    scheme = QuantScheme(float_sites=(Site("layers.9.mlp.down"),))
    quantization = Quantization(prefix, scheme, make_scales(model, prefix))
    with pytest.raises(UsageError, match=r"layers\.9\.mlp\.down"):
        export_graph(model.spec, model.weights, quantization, GraphForm(), tmp_path)


def test_a_site_without_scale_is_named(make_model, make_scales, tmp_path: Path) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    scales = make_scales(model, prefix)
    left = {s: v for s, v in scales.scales.items() if s not in ("layers.1.mlp.down", "head")}
    error = call(model, prefix, dataclasses.replace(scales, scales=left), tmp_path)
    assert error.message == "no activation scale for Site layers.1.mlp.down (2 missing)"
    assert "calibrate" in error.hint


def test_an_unused_scale_does_no_harm(export) -> None:
    assert "head.scale" not in stored(export(QuantScheme(quantize_head=False)))


@pytest.mark.parametrize("opset", [-1, 16, 23])
def test_an_opset_out_of_range_is_refused_with_the_range(opset: int, make_model, make_scales, tmp_path: Path) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    error = call(model, prefix, make_scales(model, prefix), tmp_path, opset=opset)
    assert str(opset) in error.message
    assert error.hint == "choose 17 to 22"
