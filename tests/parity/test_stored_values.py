"""What is written in a graph is compared bit for bit, and a wrong constant is named at its own Site."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cushion_deploy.core.sites import Site
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.ladder import segment_rung
from cushion_deploy.parity.reference import linear_codes
from cushion_deploy.parity.segments import SegmentRun
from cushion_deploy.parity.stored_values import scale_rung, weight_rung

LINEARS = 3 * 7 + 1


def one(checks: list[ParityCheck]) -> ParityCheck:
    (check,) = checks
    return check


def weights_of(d: Any) -> Any:
    return linear_codes(d.model, d.scheme)


@pytest.mark.parametrize("kind", ["graph", "half"])
def test_an_intact_graph_holds_what_it_was_built_from(kind: str, deployed) -> None:
    graph = getattr(deployed, kind)
    scales, weights = one(scale_rung("a", graph, deployed.scales)), one(weight_rung("b", graph, weights_of(deployed)))
    assert (scales.rung, scales.passed, scales.value, scales.site) == ("a", True, 0, None)
    assert (weights.rung, weights.passed, weights.value, weights.site) == ("b", True, 0, None)
    assert scales.note == "13 Sites compared bit for bit"
    assert weights.note == f"{LINEARS} linears compared bit for bit"


@pytest.mark.parametrize("site", ["layers.0.attn.qkv", "layers.1.mlp.down", "head"])
def test_the_last_bit_of_a_scale_is_named_at_its_own_site(site: str, deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{site}.scale"] = np.nextafter(tensors[f"{site}.scale"], np.float32(np.inf))

    graph = sabotaged(deployed.graph, edit)
    check = one(scale_rung("rung", graph, deployed.scales))
    assert (check.passed, check.value, check.site) == (False, 1, site)
    assert check.note.startswith(f"first diverging Site: {site}; ")
    # One bit changes no code: no run of the graph would tell.
    assert all(c.passed for c in segment_rung("run", deployed.reference, SegmentRun(graph, deployed.scales, "literal")))


def test_every_other_scale_counts_and_the_first_is_named(deployed) -> None:
    other = {s: v * (1.5 if s in ("layers.2.mlp.down", "layers.1.attn.out") else 1) for s, v in scales_of(deployed)}
    check = one(scale_rung("rung", deployed.graph, dataclasses.replace(deployed.scales, scales=other)))
    assert (check.value, check.site) == (2, "layers.1.attn.out")


def scales_of(d: Any) -> list[tuple[Site, float]]:
    return sorted(d.scales.scales.items(), reverse=True)


def test_a_dequantizer_with_a_scale_of_its_own_is_seen(deployed, tmp_path: Path) -> None:
    model = onnx.load(deployed.graph.path)
    (node,) = (
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "layers.1.attn.qkv.codes"
    )
    scale = np.float32(deployed.scales.scales[Site("layers.1.attn.qkv")] * 2)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "another"))
    node.input[1] = "another"
    onnx.save_model(model, tmp_path / "model.onnx")
    graph = dataclasses.replace(deployed.graph, path=tmp_path / "model.onnx")
    assert one(scale_rung("rung", graph, deployed.scales)).site == "layers.1.attn.qkv"


def test_a_graph_without_quantizers_has_no_right_scale_and_no_right_weight(deployed) -> None:
    assert one(scale_rung("rung", deployed.twin, deployed.scales)).value == 13
    assert one(weight_rung("rung", deployed.twin, weights_of(deployed))).value == LINEARS


@pytest.mark.parametrize(
    ("name", "columns", "differing"),
    [
        ("layers.1.attn.qkv.weight_codes", [0], 1),
        ("layers.1.attn.qkv.weight_codes", [63, 64, 96], 3),
        ("layers.0.mlp.gate_up.weight_codes", [95], 1),
        ("layers.0.mlp.gate_up.weight_scales", [96, 191], 1),
        ("head.weight_scales", [5], 1),
    ],
)
def test_another_weight_is_counted_by_linear(
    name: str, columns: list[int], differing: int, deployed, sabotaged
) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        array = tensors[name]
        array[..., columns] = array[..., columns] ^ 1 if array.dtype == np.int8 else array[..., columns] * 2

    check = one(weight_rung("rung", sabotaged(deployed.graph, edit), weights_of(deployed)))
    assert (check.passed, check.value, check.site) == (False, differing, name.rpartition(".")[0])


def test_the_weights_of_fake_quant_follow_the_rule(deployed) -> None:
    module = deployed.model.module
    found = list(weights_of(deployed))
    assert [site for site, _, _ in found[:7]] == [
        *["layers.0.attn.qkv"] * 3,
        "layers.0.attn.out",
        *["layers.0.mlp.gate_up"] * 2,
        "layers.0.mlp.down",
    ]
    for index, linear in ((1, module.model.layers[0].self_attn.k_proj), (21, module.lm_head)):
        weight = linear.weight.numpy()
        expected = (np.abs(weight).max(1) / np.float32(127)).astype(np.float32)
        np.testing.assert_array_equal(found[index][2], expected)
        np.testing.assert_array_equal(found[index][1], np.rint(weight / expected[:, None]))
