"""The rule embedding-codes refuses an INT8 embedding that is stored twice, or read with other scales than its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_graph import Edit, insert, node, put, rewire

from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.rules import check_graph

ROWS, BLOCK = 7, 32
WIDTH = 2 * BLOCK


def whole() -> onnx.ModelProto:
    """Return a graph with an INT8 embedding that a tied head reads."""
    tensors = {
        "codes": (np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 128).astype(np.int8),
        "scales": np.full((ROWS, 2), 2**-7, np.float16),
        "blocks": np.array([0, 0, 2, BLOCK], np.int64),
        "joined": np.array([0, 0, WIDTH], np.int64),
        "last": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["codes", "ids"], ["row_codes"], "rows"),
        helper.make_node("Cast", ["row_codes"], ["row_floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["row_floats", "blocks"], ["row_blocks"], "reshape"),
        helper.make_node("Gather", ["scales", "ids"], ["row_halves"], "row_scales"),
        helper.make_node("Cast", ["row_halves"], ["row_scales"], "widen", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["row_scales", "last"], ["row_columns"], "unsqueeze"),
        helper.make_node("Mul", ["row_blocks", "row_columns"], ["parts"], "multiply"),
        helper.make_node("Reshape", ["parts", "joined"], ["x"], "join"),
        helper.make_node("Transpose", ["codes"], ["turned"], "transpose", perm=[1, 0]),
        helper.make_node("Cast", ["scales"], ["wide"], "widen_all", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["turned_scales"], "transpose_scales", perm=[1, 0]),
        helper.make_node(
            "DequantizeLinear", ["turned", "turned_scales"], ["weight"], "weight_DQ", axis=0, block_size=BLOCK
        ),
        helper.make_node("MatMul", ["x", "weight"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, ROWS])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def check(model: onnx.ModelProto, *, int8_embedding: bool = True) -> dict[str, int]:
    return check_graph(ir.serde.deserialize_model(model), set(), int8_embedding=int8_embedding)


def test_an_embedding_that_a_tied_head_reads_passes_and_is_examined() -> None:
    found = check(whole())
    assert found["embedding-codes"] == 1
    assert found["both-operands"] == 0, "a tied head is no quantized product"


def test_a_floating_point_embedding_is_refused_where_codes_are_expected() -> None:
    model = whole()
    put(model, "table", np.ones((ROWS, WIDTH), np.float32))
    rewire(model, "rows", 0, "table")
    for name in ("transpose", "widen_all", "transpose_scales", "weight_DQ"):
        model.graph.node.remove(node(model, name))
    put(model, "weight", np.ones((WIDTH, ROWS), np.float32))
    assert check(model, int8_embedding=False)["embedding-codes"] == 0
    with pytest.raises(CheckFailed, match=r"\[embedding-codes\] the embedding: is not stored as INT8 codes; "):
        check(model)


def other_ids(model: onnx.ModelProto) -> None:
    put(model, "others", np.zeros((1, 3), np.int64))
    rewire(model, "row_scales", 1, "others")


def other_head_scales(model: onnx.ModelProto) -> None:
    put(model, "others", np.full((ROWS, 2), 0.02, np.float32))
    rewire(model, "transpose_scales", 0, "others")


def whole_rows(model: onnx.ModelProto) -> None:
    put(model, "others", np.full(ROWS, 0.01, np.float32))
    rewire(model, "weight_DQ", 1, "others")
    attributes = {a.name: a for a in node(model, "weight_DQ").attribute}
    attributes["axis"].i, attributes["block_size"].i = 1, 0


def too_few(model: onnx.ModelProto) -> None:
    put(model, "scales", np.full((ROWS, 1), 0.01, np.float32))


def zero_scale(model: onnx.ModelProto) -> None:
    scales = np.full((ROWS, 2), 0.01, np.float32)
    scales[2] = 0
    put(model, "scales", scales)


def second_reader(model: onnx.ModelProto) -> None:
    insert(model, "head", helper.make_node("Identity", ["codes"], ["again"], "identity"))


BROKEN: list[tuple[str, Edit]] = [
    ("rows: is not multiplied by stored scales of the same row", other_ids),
    ("weight_DQ: has other scales than the rows of the embedding", other_head_scales),
    ("weight_DQ: does not scale the embedding by its blocks", whole_rows),
    (f"rows: has scales of shape [{ROWS}, 1], not [{ROWS}, 2]", too_few),
    ("rows: has ", zero_scale),
    ("rows: has scales of type DOUBLE", lambda m: put(m, "scales", np.full((ROWS, 2), 0.01))),
    ("identity: reads the codes of the embedding", second_reader),
    (
        "initializer table: stores the embedding a second time",
        lambda m: put(m, "table", np.ones((ROWS, WIDTH), np.float32)),
    ),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    model = whole()
    damage(model)
    with pytest.raises(CheckFailed) as caught:
        check(model)
    lines = caught.value.message.splitlines()
    assert [line for line in lines if line.startswith(f"[embedding-codes] {words}")], lines
