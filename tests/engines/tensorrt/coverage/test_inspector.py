"""Parsing the JSON of the engine inspector: the same kernels as in the build log; anything unknown is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cushion_deploy.core.sites import Site
from cushion_deploy.engines.tensorrt.coverage.inspector import read_inspection
from cushion_deploy.engines.tensorrt.coverage.plan_report import GraphLinear
from cushion_deploy.errors import CheckFailed

VERSION = "10.13.2"
MATMUL = GraphLinear("layers.0.mlp/MatMul_9", Site("layers.0.mlp.down"), 1)


def layer(kind: str, **changes: Any) -> dict[str, Any]:
    """Return a layer as TensorRT 10 writes it."""
    return {
        "Name": "layers.0.mlp/MatMul_9_myl0_7",
        "LayerType": kind,
        "Inputs": [{"Name": "a", "Dimensions": [1, -1, 64], "Format/Datatype": "Int8"}],
        "Constants": [{"Name": "w", "Dimensions": [1, 64, 64], "Format/Datatype": "Int8"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, -1, 64], "Format/Datatype": "Float"}],
        "TacticName": "sm80_xmma_gemm_i8f32",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: layers.0.mlp/MatMul_9]\x1f[ONNX Layer: layers.0.mlp/DQ_7]",
        **changes,
    }


def text(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["input_ids"]})


@pytest.mark.parametrize(
    "operands",
    [
        {},
        {"Inputs": [{"Name": "a", "Datatype": "Int8", "Format": "Linear"}] * 2, "Constants": []},
        {"Inputs": [{"Name": "a", "Format/Datatype": "Row major Int8 format"}]},
        {"Inputs": [{"Name": "a", "Dimensions": [1, "E0"], "Format": "Linear", "DataType": "Int8"}]},
    ],
)
def test_an_int8_product_is_found_in_every_spelling(operands: dict[str, Any]) -> None:
    report = read_inspection(text(layer("gemm", **operands)), 1, VERSION)
    assert report.int8_gemms == (1,)
    assert report.int8_linears([MATMUL]) == 1
    assert report.kernels[0].nodes == ("layers.0.mlp/MatMul_9", "layers.0.mlp/DQ_7")


def test_kernels_of_other_kinds_need_not_tell_their_types() -> None:
    # As TensorRT writes tensors of dynamic shape, and types that are not used here.
    silent = [{"Name": "a", "Dimensions": None, "Format/Datatype": "N/A due to dynamic shapes"}, {"Name": "b"}]
    report = read_inspection(
        text(layer("Reformat", Inputs=silent, Constants=[], Metadata=""), layer("kgen", Outputs=silent), layer("gemm")),
        1,
        VERSION,
    )
    assert report.int8_linears([MATMUL]) == 1
    assert [tensor.dtype for tensor in report.kernels[0].inputs] == ["Unknown", "Unknown"]
    # A product without listed operands is not INT8, whatever the name of its tactic.
    other = layer("gemm", Inputs=silent, Metadata="")
    assert read_inspection(text(other), 1, VERSION).int8_gemms == (0,)


@pytest.mark.parametrize("wide", [{"Constants": []}, {"Inputs": [{"Name": "a", "Format/Datatype": "Half"}]}])
def test_what_is_not_said_to_be_int8_is_not_counted(wide: dict[str, Any]) -> None:
    assert read_inspection(text(layer("gemm", **wide)), 1, VERSION).int8_linears([MATMUL]) == 0


def test_hazards_attention_and_moves_have_the_same_schema_as_from_the_log() -> None:
    half = [{"Name": "y", "Format/Datatype": "Half"}]
    report = read_inspection(
        text(
            layer("gemm", Outputs=half),
            layer("kgen", Name="_gemm_mha_v2_myl0_8", TacticName="_gemm_mha_v2_0x1"),
            layer("Reformat", Name="Reformatting CopyNode for Input Tensor 0", TacticName=""),
        ),
        1,
        VERSION,
    )
    assert report.half_accumulators == ("layers.0.mlp/MatMul_9_myl0_7",)
    assert (report.fused_attention, report.moves) == (1, (1,))


def test_kernels_of_a_second_profile_are_its_own() -> None:
    operand = {"Name": "a [profile 1]", "Format/Datatype": "Int8"}
    second = layer("gemm", Name="layers.0.mlp/MatMul_9_myl1_7", Inputs=[operand])
    report = read_inspection(text(layer("gemm"), second), 2, VERSION)
    assert report.int8_gemms == (1, 1)
    assert report.int8_linears([MATMUL]) == 1
    # A plan of two profiles whose second has no kernel of the linear runs it in floating point there.
    assert read_inspection(text(layer("gemm")), 2, VERSION).int8_linears([MATMUL]) == 0


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("Layers: ...", "no JSON object"),
        ("[]", "no JSON object"),
        (text("a name alone"), "names without details"),
        (text(), "kernels of profile -1"),
        (
            text(layer("gemm", Inputs=[{"Name": "a", "Format/Datatype": "Q4"}])),
            "without the types of its operands",
        ),
        (text(layer("gemm", Inputs=[{"Name": "a", "Dimensions": None}])), "without the types of its operands"),
        (text(layer("gemm", Inputs="a")), "Inputs is not a list"),
        (text(layer("gemm", Name="x_myl1_0 [profile 3]")), "kernels of profile 3 in a plan of 2"),
    ],
)
def test_what_it_cannot_read_it_refuses(written: str, words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        read_inspection(written, 2, VERSION)
