"""Parsing the layer listing of the build log, on real listings of TensorRT-RTX 1.7.1.116."""

from __future__ import annotations

import dataclasses
import gzip
import re
from pathlib import Path

import pytest

from cushion_deploy.core.sites import Site
from cushion_deploy.engines.tensorrt.coverage.layer_log import SUPPORTED_VERSION, read_plan
from cushion_deploy.engines.tensorrt.coverage.plan_report import GraphLinear
from cushion_deploy.errors import CheckFailed

DATA = Path(__file__).parent / "data"
VERSION = "1.7.1.116"
SMOLLM2 = "smollm2-135m"
FLOAT_HEAD = "tiny-float16-float-head"
FLOAT32 = "tiny-float32"
CONTRACTING = "tiny-contracting-axis-scale"
GEMMA2 = "gemma2-tiny-bfloat16"


def listing(name: str) -> str:
    """Return a recorded listing."""
    return gzip.decompress((DATA / f"{name}.layers.txt.gz").read_bytes()).decode()


def gemm_nodes(text: str) -> list[str]:
    """Return the nodes that start the names of gemm kernels of profile 0, by independent parsing."""
    names = re.findall(r"^Name: ([^ ,]+), LayerType: gemm", text, flags=re.MULTILINE)
    return [re.sub(r"_U\d+_myl\d+_\d+$", "", name) for name in names]


@pytest.mark.parametrize("name", [SMOLLM2, FLOAT_HEAD, FLOAT32, CONTRACTING, GEMMA2])
def test_every_line_of_a_real_listing_becomes_a_kernel(name: str) -> None:
    text = listing(name)
    report = read_plan(text, VERSION)
    assert len(report.kernels) == text.count("LayerType: ")
    assert report.profiles == 2
    assert {k.profile for k in report.kernels} == {0, 1}


@pytest.mark.parametrize(
    ("name", "int8_gemms", "fused"),
    # 4 packed linears a layer, and the head where it is quantized; FP32 graphs and soft caps have no fused attention.
    [
        (SMOLLM2, 4 * 30 + 1, 30),
        (FLOAT_HEAD, 4 * 2, 2),
        (FLOAT32, 4 * 2 + 1, 0),
        (CONTRACTING, 4 * 2 + 1 - 1, 2),
        (GEMMA2, 4 * 3 + 1, 0),
    ],
)
def test_int8_gemms_and_fused_attention_are_counted_in_each_profile(name: str, int8_gemms: int, fused: int) -> None:
    report = read_plan(listing(name), VERSION)
    assert report.int8_gemms == (int8_gemms, int8_gemms)
    assert report.fused_attention == fused


@pytest.mark.parametrize("name", [SMOLLM2, FLOAT_HEAD, CONTRACTING])
def test_no_int8_product_of_ours_is_written_as_half(name: str) -> None:
    assert read_plan(listing(name), VERSION).half_accumulators == ()


def test_an_int8_product_written_as_half_is_a_hazard() -> None:
    lines = listing(FLOAT_HEAD).splitlines()
    i = next(i for i, line in enumerate(lines) if "LayerType: gemm" in line and "Datatype: Int8" in line)
    before, outputs, after = lines[i].partition("Outputs: ")
    lines[i] = before + outputs + after.replace("Datatype: Float", "Datatype: Half", 1)
    report = read_plan("\n".join(lines), VERSION)
    assert report.half_accumulators == (re.match(r"Name: ([^,]+),", lines[i])[1],)  # type: ignore[index]


def test_kernels_that_only_move_are_counted() -> None:
    # One for each of SmolLM2's 30 attentions in each profile, by independent parsing.
    tactics = re.findall(r"TacticName: __myl_([A-Za-z]+)_0x", listing(SMOLLM2))
    expected = sum(re.fullmatch("(Move|Resh|Tran|Cast|Slic|Conc)+", tactic) is not None for tactic in tactics)
    assert expected == 60
    report = read_plan(listing(SMOLLM2), VERSION)
    assert sum(report.moves) == 60
    assert not any(kernel.only_moves for kernel in report.kernels if kernel.is_gemm or kernel.is_fused_attention)


def test_linears_are_counted_before_packing() -> None:
    text = listing(SMOLLM2)
    nodes = gemm_nodes(text)
    packs = {0: 3, 1: 1, 2: 2, 3: 1}
    linears = [
        GraphLinear(node, Site(f"site.{i}"), 1 if node.startswith("head/") else packs[i % 4])
        for i, node in enumerate(nodes)
    ]
    report = read_plan(text, VERSION)
    assert len(nodes) == 121
    assert report.fallbacks(linears) == ()
    assert report.int8_linears(linears) == 30 * 7 + 1


def test_a_linear_that_lost_int8_is_named_with_its_site_and_the_kernels_that_stand_in() -> None:
    linear = GraphLinear("layers.0.mlp/MatMul_90", Site("layers.0.mlp.gate_up"), 2)
    other = GraphLinear("layers.0.mlp/MatMul_100", Site("layers.0.mlp.down"), 1)
    report = read_plan(listing(CONTRACTING), VERSION)
    fallbacks = report.fallbacks([linear, other])
    assert report.int8_linears([linear, other]) == 1
    assert [(f.linear.site, f.profile) for f in fallbacks] == [(linear.site, 0), (linear.site, 1)]
    assert "layers.0.mlp.gate_up (layers.0.mlp/MatMul_90) in profile 0: no Q/DQ rule is broken" in str(fallbacks[0])
    assert "(runtime_fusion __myl_" in str(fallbacks[0])
    found = report.fallbacks([dataclasses.replace(linear, broken="weight-scales: on the contracting axis")])
    assert found[0].reason == "weight-scales: on the contracting axis"


def test_a_linear_that_no_kernel_names_counts_as_floating_point() -> None:
    ghost = GraphLinear("layers.0.mlp/MatMul_9999", Site("layers.0.mlp.down"), 1)
    report = read_plan(listing(CONTRACTING), VERSION)
    assert report.int8_linears([ghost]) == 0
    assert "no kernel names it" in str(report.fallbacks([ghost])[0])


def test_a_linear_in_int8_in_one_profile_only_does_not_count() -> None:
    text = listing(FLOAT_HEAD)
    node = "layers.1.mlp/MatMul_173"
    lines = text.split("\n")
    index = next(i for i, line in enumerate(lines) if line.startswith(f"Name: {node} [profile 1]"))
    lines[index] = lines[index].replace("Datatype: Int8", "Datatype: Half")
    linear = GraphLinear(node, Site("layers.1.mlp.down"), 1)
    assert read_plan(text, VERSION).int8_linears([linear]) == 1
    report = read_plan("\n".join(lines), VERSION)
    assert report.int8_linears([linear]) == 0
    assert [f.profile for f in report.fallbacks([linear])] == [1]


def test_a_fusion_that_only_reads_int8_is_no_int8_gemm() -> None:
    text = listing(FLOAT_HEAD)
    changed = text.replace("LayerType: gemm", "LayerType: runtime_fusion", 1)
    before, after = read_plan(text, VERSION).int8_gemms, read_plan(changed, VERSION).int8_gemms
    assert after == (before[0] - 1, before[1])


def test_a_gemm_that_belongs_to_no_known_product_is_visible() -> None:
    report = read_plan(listing(FLOAT_HEAD), VERSION)
    nodes = {node for k in report.kernels if k.is_int8_gemm for node in k.nodes}
    assert [name.split("_U")[0] for name in report.unknown_gemms(nodes)] == ["head/Gemm_185"]
    assert report.unknown_gemms([*nodes, "head/Gemm_185"]) == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace("LayerType: ", "Kind: "),
        lambda line: line.replace("Datatype: Int8", "Type: Int8"),
        lambda line: line.replace("Metadata: ", "Origin: "),
        lambda line: line[: len(line) // 2],
        lambda line: "something new: " + line,
    ],
)
def test_a_line_that_cannot_be_read_is_an_error_with_its_number_and_the_supported_version(damage: object) -> None:
    lines = listing(FLOAT_HEAD).split("\n")
    index = next(i for i, line in enumerate(lines) if "LayerType: gemm" in line)
    lines[index] = damage(lines[index])  # type: ignore[operator]
    with pytest.raises(CheckFailed, match=rf"line {index + 1} .*9\.9") as caught:
        read_plan("\n".join(lines), "9.9")
    assert SUPPORTED_VERSION in caught.value.hint
    assert lines[index][:40] in caught.value.message


@pytest.mark.parametrize("text", ["", "Kernels:\n", "Layers:\n", "Layers:\n\nI/O Tensors:\n"])
def test_a_message_without_the_known_sections_is_refused(text: str) -> None:
    with pytest.raises(CheckFailed, match="cannot be read"):
        read_plan(text, VERSION)
