"""A 16-bit graph in float32 has the values that numpy and torch compute in the type itself, operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from cushion_deploy.export.builder import DTYPES, GraphBuilder
from cushion_deploy.parity.rounding import narrow_nodes, widen

A = np.array([[1.0, 300.0, 0.1, -7.3], [2049.0, 40_000.0, 3.3, 60_000.0]], dtype=np.float32)
B = np.array([[1.001, 250.0, 0.3, 1e-3], [1.0, 1.0, -1.7, 0.5]], dtype=np.float32)
C = np.array([[0.1, 5.0, 1e-6, 2.2], [0.5, 40_000.0, 1.3, 50_000.0]], dtype=np.float32)


def graph(dtype: Any) -> ir.Model:
    """Return ``a * b + c`` with ``b`` stored, then the first column of its transpose, and the same sum in float32."""
    g = GraphBuilder(17, DTYPES[dtype])
    g.scope("test")
    a, c = (g.input(name, g.dtype, [2, 4]) for name in "ac")
    stored = g.constant(torch.from_numpy(B).numpy().astype(g.dtype.numpy()), "b")
    total = g.op("Add", g.op("Mul", a, stored), c)
    g.output(g.op("Transpose", total, perm=[1, 0]), "total", g.dtype, [4, 2])
    wide = g.op("Add", g.op("Mul", g.to_float32(a), g.to_float32(stored)), g.to_float32(c))
    g.output(wide, "wide", ir.DataType.FLOAT, [2, 4])
    return g.build("test")


def run(model: ir.Model) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    return list(session.run(["total", "wide"], {"a": A, "c": C}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_result_is_rounded_and_what_is_float32_is_not(dtype: str) -> None:
    model = graph(dtype)
    widen(model, dtype)
    total, wide = run(model)
    kind = getattr(torch, dtype)
    a, b, c = (torch.from_numpy(x) for x in (A, B, C))
    expected = ((a.to(kind) * b.to(kind)) + c.to(kind)).float().T.numpy()
    # The inputs of the widened graph are float32: here they are given unrounded, and b is stored rounded.
    product = (a * b.to(kind).float()).to(kind).float()
    np.testing.assert_array_equal(total, (product + c).to(kind).float().T.numpy())
    assert np.isinf(total[:, 0]).any() == (dtype == "float16"), "300 * 250 is 75,000"
    assert np.isinf(total).sum() == np.isinf(expected).sum()
    np.testing.assert_array_equal(wide, A * b.to(kind).float().numpy() + C)


def test_without_rounding_nothing_overflows() -> None:
    model = graph("float16")
    widen(model, "float16", rounded=False)
    total, _ = run(model)
    np.testing.assert_allclose(total.T, A * B.astype(np.float16).astype(np.float32) + C, rtol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("brain", "bfloat16")])
def test_the_nodes_of_a_type_are_those_that_onnx_infers(name: str, dtype: str, deployed: Any) -> None:
    path = getattr(deployed, name).path
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    element = getattr(onnx.TensorProto, dtype.upper())
    expected = [node.name for node in inferred.node if types[node.output[0]] == element]
    assert [node.name for node in narrow_nodes(ir.load(path), dtype)] == expected
    assert expected
