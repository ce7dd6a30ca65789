"""Segment by segment: an intact graph equals fake-quant, and a fault is found at the Site behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cushion_deploy.parity.compare import compare_codes, compare_logits
from cushion_deploy.parity.ladder import segment_rung
from cushion_deploy.parity.limits import CODE_DIFFERENCE, IDENTICAL_CODES
from cushion_deploy.parity.segment_checks import first_diverging
from cushion_deploy.parity.segments import SegmentRun

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], None]


@pytest.mark.parametrize("kernels", ["literal", "fused"])
def test_an_intact_graph_returns_the_codes_and_logits_of_fake_quant(kernels: str, deployed) -> None:
    reference = deployed.reference
    logits, codes, present = SegmentRun(deployed.graph, deployed.scales, kernels)(reference.ids, reference.codes)
    assert list(codes) == list(deployed.graph.sites) == list(reference.codes)
    for site, distance in compare_codes(reference.codes, codes).items():
        assert distance.identical >= IDENTICAL_CODES, site
        assert distance.largest <= CODE_DIFFERENCE, site
    assert compare_logits(reference.quantized_logits, logits).maximum <= 1e-3
    layers, length = deployed.model.spec.num_layers, reference.ids.shape[1]
    assert {v.shape[2] for v in present.values()} == {length}
    assert set(present) == {f"present.{i}.{p}" for i in range(layers) for p in ("key", "value")}


def test_a_segment_starts_from_the_codes_it_is_given(deployed) -> None:
    """The codes computed for a Site follow from the forced codes of the Site before, not from the token ids."""
    reference, run = deployed.reference, SegmentRun(deployed.graph, deployed.scales, "literal")
    forced = {site: codes.copy() for site, codes in reference.codes.items()}
    forced["layers.1.mlp.gate_up"][:] = 0
    _, codes, _ = run(reference.ids, forced)
    assert not codes["layers.1.mlp.down"].any(), "silu(0) * 0 is 0"
    distances = compare_codes(reference.codes, codes)
    assert [site for site, d in distances.items() if d.identical < 1] != []
    assert distances["layers.1.mlp.gate_up"].identical >= IDENTICAL_CODES, "what would enter it is untouched"
    assert first_diverging(distances) == "layers.1.mlp.down"


def test_a_past_continues_the_text(deployed) -> None:
    reference, run = deployed.reference, SegmentRun(deployed.graph, deployed.scales, "literal")
    logits, codes, present = run(reference.ids, reference.codes)
    past = {n.replace("present", "past_key_values"): np.ascontiguousarray(v[:, :, :40]) for n, v in present.items()}
    rest = {site: c[:, 40:] for site, c in reference.codes.items()}
    tail, tail_codes, _ = run(reference.ids[:, 40:], rest, past)
    assert compare_logits(logits[:, 40:], tail).maximum <= 1e-4
    assert min(d.identical for d in compare_codes({s: c[:, 40:] for s, c in codes.items()}, tail_codes).values()) > 0.99


def one_code(site: str, row: int, column: int) -> Edit:
    """Move one weight code by half its range."""

    def edit(tensors: Tensors) -> None:
        codes = tensors[f"{site}.weight_codes"]
        codes[row, column] = codes[row, column] ^ np.int8(64)

    return edit


def larger_scale(name: str) -> Edit:
    """Make an activation scale, or all scales of a weight, 5 % larger."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = (tensors[name] * np.float32(1.05)).astype(np.float32)

    return edit


def other_prefix(name: str) -> Edit:
    """Turn the sign of one position of the prefix."""

    def edit(tensors: Tensors) -> None:
        tensors[name][:, :, 1] *= -1

    return edit


def swap_query_and_key(tensors: Tensors) -> None:
    """Exchange the first query head with the first key head of layer 1 (4 query heads of 16)."""
    for part in ("codes", "scales"):
        array = tensors[f"layers.1.attn.qkv.weight_{part}"]
        first, key = array[..., :16].copy(), array[..., 64:80].copy()
        array[..., :16], array[..., 64:80] = key, first


FAULTS: dict[str, tuple[Edit, str | None]] = {
    "code of a value projection": (one_code("layers.0.attn.qkv", 5, 100), "layers.0.attn.out"),
    "code of an output projection": (one_code("layers.0.attn.out", 9, 11), "layers.0.mlp.gate_up"),
    "code of a gate projection": (one_code("layers.1.mlp.gate_up", 3, 2), "layers.1.mlp.down"),
    "code of an up projection": (one_code("layers.1.mlp.gate_up", 60, 190), "layers.1.mlp.down"),
    "code of a down projection": (one_code("layers.1.mlp.down", 95, 63), "layers.2.attn.qkv"),
    "code of the last down projection": (one_code("layers.2.mlp.down", 0, 0), "head"),
    "activation scale": (larger_scale("layers.1.attn.out.scale"), "layers.1.mlp.gate_up"),
    "activation scale of the first Site": (larger_scale("layers.0.attn.qkv.scale"), "layers.0.attn.out"),
    "weight scales": (larger_scale("layers.2.mlp.gate_up.weight_scales"), "layers.2.mlp.down"),
    "norm": (larger_scale("model.layers.1.input_layernorm.weight"), "layers.1.attn.qkv"),
    "embedding": (larger_scale("model.embed_tokens.weight"), "layers.0.mlp.gate_up"),
    "value of the prefix": (other_prefix("prefix.1.value"), "layers.1.attn.out"),
    "key of the prefix": (other_prefix("prefix.2.key"), "layers.2.attn.out"),
    "query and key exchanged": (swap_query_and_key, "layers.1.attn.out"),
    "code of the head": (one_code("head", 7, 50), None),
    "activation scale of the head": (larger_scale("head.scale"), None),
}


@pytest.mark.parametrize("kernels", ["literal", "fused"])
@pytest.mark.parametrize(("edit", "site"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_named_by_the_first_site_behind_it(
    edit: Edit, site: str | None, kernels: str, deployed, sabotaged
) -> None:
    graph = sabotaged(deployed.graph, edit)
    checks = segment_rung("rung", deployed.reference, SegmentRun(graph, deployed.scales, kernels))
    assert not all(check.passed for check in checks)
    assert {check.site for check in checks if "code" in check.metric} == {site}
    if site is None:
        assert [check.passed for check in checks] == [True, True, False], "only the logits lie behind the head"
        assert checks[2].site == "head"
        assert checks[2].note.startswith("the difference arises after the input of the last Site, head; max ")
    else:
        assert f"first diverging Site: {site}" in checks[0].note
        assert not checks[0].passed or not checks[1].passed
