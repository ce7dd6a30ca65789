"""A graph form refuses what cannot be written, alone and together with a model and a quantization."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graph_form import MAX_OPSET, MIN_OPSET, STATIC_OPSET, GraphForm
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError

SPEC = ModelSpec(
    family="llama", source="none", weights_digest="model", vocab_size=9, hidden_size=8, intermediate_size=8,
    num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, max_positions=20, norm_eps=1e-5, activation="silu",
    rotary=None, tied_head=True, parameters=1, bos_token_id=None, eos_token_ids=(), attention_scale=0.5,
)  # fmt: skip


def prefix_of(length: int, value: float = 1.0) -> Prefix:
    keys = np.full((1, 2, length, 4), value, np.float32)
    return Prefix(tuple(range(length)), keys, keys, "model")


def quantization_of(prefix: Prefix, *, with_prefix: bool = False) -> Quantization:
    lineage = Lineage("model", prefix.digest, text="text")
    scales = ActivationScales({Site("head"): 0.5}, "max", lineage, 7)
    steps = np.full((1, 2), 0.1, np.float32)
    kv = KvScales(steps, steps, "per-head", "max", lineage, 7, with_prefix=with_prefix)
    return Quantization(prefix, QuantScheme(), scales, kv_scales=kv)


@pytest.mark.parametrize(
    ("form", "message", "hint"),
    [
        ({"dtype": "float64"}, "unknown graph type 'float64'", "float32, float16, bfloat16"),
        ({"scale_dtype": "int8"}, "unknown scale type 'int8'", "float32"),
        ({"cache": "float"}, "unknown cache 'float'", "growing, static, int8"),
        ({"prefix": "inside"}, "unknown place of the prefix 'inside'", "baked, cache, none"),
        ({"opset": MIN_OPSET - 1}, "opset 16 is not supported", "choose 17 to 22"),
        ({"opset": MAX_OPSET + 1}, "opset 23 is not supported", "choose 17 to 22"),
        ({"capacity": 8}, "a growing cache has no capacity, but 8 slots were given", "static"),
        ({"cache": "static"}, "a static cache of 0 slots", "tensorrt.max_context"),
        ({"cache": "static", "capacity": -1}, "a static cache of -1 slots", "tensorrt.max_context"),
        ({"cache": "int8", "capacity": 8}, "an INT8 cache cannot be static", "export.kv_cache=int8"),
    ],
)
def test_a_form_that_contradicts_itself_is_refused(form: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        GraphForm(**form)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("form", "quantization", "message"),
    [
        ({}, replace(quantization_of(prefix_of(2)), scales=None), "needs activation scales"),
        ({"prefix": "none"}, quantization_of(prefix_of(2)), "a prefix of 2 positions was given"),
        ({"cache": "static", "capacity": 9}, quantization_of(prefix_of(2)), "cannot be combined with a prefix"),
        (
            {"cache": "static", "capacity": 2, "prefix": "cache"},
            quantization_of(prefix_of(2)),
            "2 slots does not fit a prefix of 2 and a model of 20 positions",
        ),
        ({"cache": "static", "capacity": 21}, quantization_of(prefix_of(0)), "a static cache of 21 slots"),
        ({"cache": "int8"}, replace(quantization_of(prefix_of(2)), kv_scales=None), "needs cache scales"),
        ({"cache": "int8", "prefix": "cache"}, quantization_of(prefix_of(2)), "but it is in the cache"),
        ({"cache": "int8"}, quantization_of(prefix_of(2), with_prefix=True), "but it is inside the graph"),
        (
            {"dtype": "float16"},
            quantization_of(prefix_of(2, 70_000.0)),
            "reaches 70,000, but the float16 maximum is 65,504",
        ),
    ],
)
def test_a_quantization_that_does_not_fit_the_form_is_refused(
    form: dict[str, Any], quantization: Quantization, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        GraphForm(**form).check(SPEC, quantization)


@pytest.mark.parametrize(
    ("form", "quantization"),
    [
        ({}, quantization_of(prefix_of(2))),
        ({"quantized": False}, Quantization(prefix_of(2), QuantScheme())),
        ({"prefix": "none"}, quantization_of(prefix_of(0))),
        ({"prefix": "cache"}, quantization_of(prefix_of(0))),
        ({"cache": "static", "capacity": 20}, quantization_of(prefix_of(0))),
        ({"cache": "static", "capacity": 3, "prefix": "cache"}, quantization_of(prefix_of(2))),
        ({"cache": "int8", "prefix": "cache"}, quantization_of(prefix_of(2), with_prefix=True)),
        ({"cache": "int8", "prefix": "cache"}, quantization_of(prefix_of(0))),
        ({"dtype": "bfloat16"}, quantization_of(prefix_of(2, 70_000.0))),
    ],
)
def test_a_quantization_that_fits_is_accepted(form: dict[str, Any], quantization: Quantization) -> None:
    GraphForm(**form).check(SPEC, quantization)


def test_a_quantization_of_another_model_is_refused() -> None:
    quantization = quantization_of(prefix_of(2))
    with pytest.raises(UsageError, match="the prefix was made for another model"):
        GraphForm().check(replace(SPEC, weights_digest="other"), quantization)
    with pytest.raises(UsageError, match="cache scales were made for another model"):
        GraphForm(cache="int8").check(replace(SPEC, num_layers=2), quantization)


def test_a_form_uses_the_parts_that_it_writes() -> None:
    whole = quantization_of(prefix_of(2))
    assert GraphForm(cache="int8").select(whole) == whole
    assert GraphForm().select(whole) == replace(whole, kv_scales=None)
    assert GraphForm(quantized=False, cache="int8").select(whole) == replace(whole, scales=None)
    assert GraphForm(quantized=False).select(whole) == whole.float_twin


def test_the_contract_follows_from_form_model_and_prefix() -> None:
    static = GraphForm(dtype="float16", cache="static", capacity=9, prefix="cache")
    contract = static.contract(SPEC, prefix_of(2))
    assert (contract.dtype, contract.cache_dtype, contract.cache_capacity) == ("float16", "float16", 9)
    assert (contract.prefix_mode, contract.prefix_slots, contract.prefix_length) == ("cache", 2, 2)
    assert static.contract(SPEC, prefix_of(0)).prefix_mode == "none"
    assert GraphForm(cache="int8").contract(SPEC, prefix_of(2)).cache_dtype == "int8"
    assert GraphForm().contract(SPEC, prefix_of(2)).prefix_mode == "baked"


def test_a_static_cache_decides_the_opset() -> None:
    assert GraphForm(opset=20).effective_opset == 20
    assert GraphForm(cache="static", capacity=9, opset=20).effective_opset == STATIC_OPSET


def test_every_field_decides_the_digest() -> None:
    other = {"dtype": "float16", "quantized": False, "prefix": "cache", "opset": 18, "scale_dtype": "float16"}
    other |= {"gathers_codes": False}
    forms = [GraphForm(), *(GraphForm(**{name: value}) for name, value in other.items())]  # type: ignore[arg-type]
    forms += [GraphForm(cache="int8"), *(GraphForm(cache="static", capacity=n) for n in (8, 9))]
    assert {*other, "cache", "capacity"} == {field.name for field in fields(GraphForm)}
    assert len({form.digest for form in forms}) == len(forms)
    assert GraphForm(**GraphForm(cache="static", capacity=8).to_json()) == GraphForm(cache="static", capacity=8)
