"""The nouns keep their invariants, survive JSON, and name their parents by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site, layer_site
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.parity.checks import ParityCheck, ParityReport
from cushion_deploy.store.digests import digest_arrays, digest_json

SPEC = ModelSpec(
    family="llama",
    source="org/name",
    weights_digest="abc",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    max_positions=32,
    norm_eps=1e-5,
    activation="silu",
    rotary=RotaryScaling(10000.0, "linear", {"factor": 2.0}),
    tied_head=True,
    parameters=123,
    bos_token_id=None,
    eos_token_ids=(2, 3),
    attention_scale=0.25,
)


def make_prefix(**changes: Any) -> Prefix:
    keys = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    return Prefix(**{"token_ids": (4, 7), "keys": keys, "values": keys + 1, "model_digest": "abc", **changes})


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_json_digest_is_sha256_of_the_canonical_text_whatever_the_order_of_keys() -> None:
    assert digest_json({"b": [1, 2.5], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,2.5]}').hexdigest()
    assert digest_json({"a": None, "b": [1, 2.5]}) == digest_json({"b": [1, 2.5], "a": None})


def test_a_json_digest_of_a_number_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_json(math.nan)


def test_an_array_digest_tells_names_types_shapes_and_order_apart_and_ignores_memory_layout() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    variants = [
        [("a", a)],
        [("b", a)],
        [("a", a.reshape(3, 2))],
        [("a", a.view(np.int32))],
        [("a", a), ("b", a)],
        [("b", a), ("a", a)],
    ]
    assert len({digest_arrays(v) for v in variants}) == len(variants)
    assert digest_arrays([("a", np.asfortranarray(a))]) == digest_arrays([("a", a)])


def test_a_site_name_is_layer_and_kind() -> None:
    assert layer_site(3, "mlp.down") == "layers.3.mlp.down"


def test_heads_that_cannot_share_key_value_heads_are_refused() -> None:
    with pytest.raises(UsageError, match="5 attention heads are not a multiple of 2"):
        dataclasses.replace(SPEC, num_heads=5)


@pytest.mark.parametrize("spec", [SPEC, dataclasses.replace(SPEC, bos_token_id=1, eos_token_ids=(), revision="v1")])
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(through_json(spec.to_json())) == spec


def test_a_scheme_digest_follows_its_fields() -> None:
    assert QuantScheme().digest == QuantScheme().digest
    assert QuantScheme().digest != QuantScheme(quantize_head=False).digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("weight_bits", 4),
        ("activation_bits", 6),
        ("quantize_head", False),
        ("activations", "dynamic"),
        ("symmetric", False),
        ("weight_group", 128),
        ("smoothing", True),
        ("float_sites", (Site("head"),)),
    ],
)
def test_every_field_of_a_scheme_changes_its_digest(field: str, value: Any) -> None:
    assert {f.name for f in dataclasses.fields(QuantScheme)} >= {field}
    assert dataclasses.replace(QuantScheme(), **{field: value}).digest != QuantScheme().digest


def test_the_order_of_float_sites_does_not_change_the_digest() -> None:
    one, other = (QuantScheme(float_sites=tuple(map(Site, names))) for names in (("a", "b"), ("b", "a")))
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"quantize_head": False, "smoothing": True, "float_sites": (Site("layers.0.mlp.down"),)}, None),
        ({"weight_bits": 4}, "4-bit weights"),
        ({"activation_bits": 6}, "6-bit activations"),
        ({"activations": "dynamic"}, "per-tensor dynamic"),
        ({"activations": "per-token"}, "per-token dynamic"),
        ({"symmetric": False}, "zero point"),
        ({"weight_group": 64}, "group of 64"),
    ],
)
def test_only_int8_with_constant_scales_and_no_zero_points_is_deployable(changes: Any, words: str | None) -> None:
    scheme = QuantScheme(**changes)
    assert scheme.deployable is (words is None)
    assert (words or "") in scheme.why_not_deployable
    assert bool(scheme.why_not_deployable) is (words is not None)


@pytest.mark.parametrize(
    ("changes", "found", "hint"),
    [
        ({"weight_bits": 3}, "weight bits '3'", "8, 6, 4"),
        ({"activation_bits": 16}, "activation bits '16'", "8, 6, 4"),
        ({"activations": "per-channel"}, "'per-channel'", "static, dynamic, per-token"),
        ({"weight_group": -1}, "-1", "0 for one scale"),
    ],
)
def test_a_scheme_that_nothing_computes_is_refused(changes: Any, found: str, hint: str) -> None:
    with pytest.raises(UsageError, match=found) as e:
        QuantScheme(**changes)
    assert hint in e.value.hint


def test_a_scheme_leaves_out_the_head_and_the_sites_to_keep_in_floating_point() -> None:
    sites = {Site(name): i for i, name in enumerate(("layers.0.attn.out", "layers.0.mlp.down", "head"))}
    assert QuantScheme().of(sites) == sites
    kept = (Site("layers.0.mlp.down"),)
    assert list(QuantScheme(float_sites=kept).of(sites)) == ["layers.0.attn.out", "head"]
    assert QuantScheme(quantize_head=False, float_sites=kept).of(sites) == {"layers.0.attn.out": 0}
    with pytest.raises(UsageError, match=r"layers\.9\.mlp\.down") as e:
        QuantScheme(float_sites=(Site("layers.9.mlp.down"),)).of(sites)
    assert "layers.0.mlp.down" in e.value.hint


def test_an_empty_prefix_has_length_zero_and_the_shape_of_the_model() -> None:
    empty = Prefix.empty(SPEC)
    assert (empty.length, empty.keys.shape, empty.token_ids) == (0, (2, 2, 0, 2), ())
    assert empty.model_digest == SPEC.weights_digest


def test_a_prefix_digest_covers_tokens_keys_and_values() -> None:
    base = make_prefix()
    digests = {
        base.digest,
        make_prefix(token_ids=(7, 4)).digest,
        make_prefix(keys=base.keys + 1).digest,
        make_prefix(values=base.values + 1).digest,
        Prefix.empty(SPEC).digest,
    }
    assert len(digests) == 5
    assert make_prefix().digest == base.digest


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (2, 2, 2), (16,)])
def test_a_prefix_of_unequal_or_flat_arrays_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UntrustedArtifact, match="not two equal 4-D arrays"):
        make_prefix(values=np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_prefix_that_is_not_finite_is_refused(part: str, bad: float) -> None:
    array = make_prefix().keys.copy()
    array[1, 0, 1, 1] = bad
    with pytest.raises(UntrustedArtifact, match=f"{part} contain NaN or infinity"):
        make_prefix(**{part: array})


def make_scales(scale: float) -> ActivationScales:
    return ActivationScales(
        {Site("head"): scale, Site("layers.0.attn.out"): 0.5}, "mse", Lineage("m", "p", text="c"), 100
    )


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-39, math.nan, math.inf])
def test_a_scale_that_no_engine_can_divide_by_is_refused_by_site(bad: float) -> None:
    with pytest.raises(UsageError, match="Site head"):
        make_scales(bad)


def test_scales_survive_json_bit_by_bit_and_digest_every_parent() -> None:
    scales = make_scales(float(np.float32(0.1)))
    again = ActivationScales.from_json(through_json(scales.to_json()))
    assert again == scales
    assert again.digest == scales.digest
    parents = ("model", "prefix", "text", "smoothing")
    lineages = (dataclasses.replace(scales.lineage, **{name: "other"}) for name in parents)
    changed = {dataclasses.replace(scales, lineage=lineage).digest for lineage in lineages}
    assert len(changed | {scales.digest}) == 5


def make_asymmetric(**changes: Any) -> ActivationScales:
    zeros = {Site("layers.0.attn.out"): 255, Site("head"): 0}
    return dataclasses.replace(make_scales(0.25), **{"zero_points": zeros, **changes})


def test_asymmetric_scales_survive_json_and_symmetric_ones_say_nothing_of_zero_points() -> None:
    plain = make_scales(0.25)
    assert not {"zero_points", "bits"} & set(plain.to_json())
    for scales in (make_asymmetric(), make_asymmetric(zero_points={}, bits=6), make_asymmetric(bits=8)):
        again = ActivationScales.from_json(through_json(scales.to_json()))
        assert again == scales
        assert again.digest == scales.digest != plain.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_points": {Site("head"): 3}}, "layers.0.attn.out has only one of scale and zero point"),
        ({"zero_points": {Site("head"): 3, Site("layers.0.attn.out"): 256}}, "zero point 256 is not a code of 8 bits"),
        ({"zero_points": {Site("head"): -1, Site("layers.0.attn.out"): 0}}, "zero point -1"),
        ({"bits": 4}, "zero point 255 is not a code of 4 bits"),
        ({"bits": 5}, "'5'"),
    ],
)
def test_zero_points_that_are_no_codes_are_refused_by_site(changes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_asymmetric(**changes)


def test_the_order_of_scales_does_not_change_their_digest() -> None:
    scales = make_scales(0.25)
    turned = dataclasses.replace(scales, scales=dict(reversed(scales.scales.items())))
    assert turned.digest == scales.digest


def test_a_graph_survives_json_in_another_folder_and_counts_its_linears() -> None:
    contract = GraphContract(2, 2, 2, 10, 32, "float16", 3)
    graph = ExportedGraph(
        Path("a/model.onnx"), contract, True, {Site("x"): 3, Site("head"): 1}, ("r1",), 21, "d", Lineage("abc")
    )
    assert graph.linears == 4
    data = through_json(graph.to_json())
    assert data["path"] == "model.onnx"
    assert ExportedGraph.from_json(data, Path("b")) == dataclasses.replace(graph, path=Path("b/model.onnx"))


def test_an_engine_survives_json() -> None:
    engine = EngineArtifact(
        "onnxruntime", ("cpu",), "k", ("a", "b"), 4, 4, 2, True, {"n": 1}, Lineage(graph="d"), {"onnxruntime": "1"}
    )
    assert EngineArtifact.from_json(through_json(engine.to_json())) == engine


@pytest.mark.parametrize(
    ("value", "direction", "passed"),
    [
        (1.0, "at most", True),
        (1.1, "at most", False),
        (math.inf, "at most", False),
        (math.nan, "at most", False),
        (1.0, "at least", True),
        (0.9, "at least", False),
        (math.nan, "at least", False),
    ],
)
def test_a_check_passes_up_to_its_limit_and_never_on_nan(value: float, direction: Any, passed: bool) -> None:
    check = ParityCheck("rung", "metric", value, 1.0, direction)
    assert check.passed is passed
    data = through_json(check.to_json())
    assert data["passed"] is passed
    assert data["value"] == (value if math.isfinite(value) else None)


def test_a_report_without_checks_has_not_passed() -> None:
    good, bad = (ParityCheck("r", "m", v, 1.0, "at most") for v in (0.0, 2.0))
    assert not ParityReport((), "corpus", 0).passed
    assert ParityReport((good,), "corpus", 1).passed
    assert not ParityReport((good, bad), "corpus", 1).passed


@pytest.mark.parametrize(
    "details", [{"dtype": "../../x"}, {"cache_capacity": -1}, {"cache_capacity": "64"}, {"cache_capacity": True}]
)
def test_an_engine_that_tells_of_no_graph_is_not_trusted(details: dict[str, Any]) -> None:
    artifact = EngineArtifact("tensorrt-rtx", ("sm86",), "k", ("engine.json",), 1, 1, 0, False, details, Lineage(), {})
    with pytest.raises(UntrustedArtifact, match=r"engine\.json of tensorrt-rtx describes a graph"):
        artifact.form  # noqa: B018 - it raises
    assert dataclasses.replace(artifact, details={}).form == ("float32", 0)
    assert dataclasses.replace(artifact, details={"dtype": "bfloat16", "cache_capacity": 64}).form == ("bfloat16", 64)
