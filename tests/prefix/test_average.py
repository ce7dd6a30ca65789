"""The averaged sink is a mean of the model's own first positions; it is kept where the model is closer to itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.average import SLACK, average_first_position, averaged_sink, first_tokens
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.prefix.trace import Averaging, SearchTrace, SinkState
from cushion_deploy.recipe import Search

Oracle = Callable[..., dict[str, float]]
FIRST = np.array([5, 5, 40, 201, 17])


def cache_of(model: TorchRunner, tokens: Sequence[int]) -> Any:
    """Return transformers' own cache after some tokens."""
    with torch.inference_mode():
        return model.module(input_ids=torch.tensor([list(tokens)]), use_cache=True).past_key_values


def log_probabilities(model: TorchRunner, ids: IntArray, prefix: Prefix | None) -> np.ndarray:
    """Return those of transformers for one text behind a prefix, float64 ``[length, vocab]``."""
    cache, begin = DynamicCache(), 0
    if prefix is not None:
        begin = prefix.length
        for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(torch.tensor(keys[None]), torch.tensor(values[None]), i)
    positions = torch.arange(begin, begin + len(ids))[None]
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor(ids[None]), position_ids=positions, past_key_values=cache).logits
    return torch.log_softmax(logits[0].double(), -1).numpy()


def test_the_first_position_is_the_mean_of_what_transformers_computes_for_each_token(
    planted_model: TorchRunner,
) -> None:
    found = planted_model.compute_prefix((97,))
    averaged = averaged_sink(planted_model, found, FIRST)
    caches = [cache_of(planted_model, [int(token)]) for token in FIRST]
    for layer in range(planted_model.spec.num_layers):
        keys = np.mean([c.layers[layer].keys[0].double().numpy() for c in caches], axis=0)
        values = np.mean([c.layers[layer].values[0].double().numpy() for c in caches], axis=0)
        np.testing.assert_allclose(averaged.keys[layer], keys, atol=1e-6)
        np.testing.assert_allclose(averaged.values[layer], values, atol=1e-6)
    assert (averaged.token_ids, averaged.model_digest) == (found.token_ids, found.model_digest)
    assert averaged.digest != found.digest


def test_the_other_tokens_of_a_prefix_are_computed_behind_it(planted_model: TorchRunner) -> None:
    one = averaged_sink(planted_model, planted_model.compute_prefix((97,)), FIRST)
    three = averaged_sink(planted_model, planted_model.compute_prefix((97, 33, 12)), FIRST)
    cache = DynamicCache()
    for i, (keys, values) in enumerate(zip(one.keys, one.values, strict=True)):
        cache.update(torch.tensor(keys[None]), torch.tensor(values[None]), i)
    with torch.inference_mode():
        planted_model.module(
            input_ids=torch.tensor([[33, 12]]), position_ids=torch.tensor([[1, 2]]), past_key_values=cache
        )
    for layer, (keys, values) in enumerate(zip(three.keys, three.values, strict=True)):
        np.testing.assert_allclose(keys, cache.layers[layer].keys[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(values, cache.layers[layer].values[0].numpy(), atol=1e-5)


FIRSTS = ((65, 97, 171, 65), (5, 40, 201, 17), (1, 2, 3, 4), (250, 9, 65, 65))


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("token", [97, 12])
def test_the_closer_prefix_is_kept_unless_its_error_is_larger_by_a_quarter(
    planted_model: TorchRunner, plain_ids: IntArray, oracle: Oracle, first: tuple[int, ...], token: int
) -> None:
    found, text = planted_model.compute_prefix((token,)), plain_ids[:64]
    prefix, trace = average_first_position(planted_model, found, text, np.array(first))
    averaged = averaged_sink(planted_model, found, np.array(first))
    original = log_probabilities(planted_model, text, None)
    # The text is one window; what is predicted at its last position does not count.
    expected = [
        (np.exp(original) * (original - log_probabilities(planted_model, text, each))).sum(-1)[16:-1].mean()
        for each in (found, averaged)
    ]
    assert [trace.found.later, trace.averaged.later] == pytest.approx(expected, rel=1e-3)
    error = oracle(planted_model, (token,), text)["error"]
    assert trace.found.error == pytest.approx(error, rel=1e-3)
    assert trace.averaged.error is not None
    assert trace.kept == (expected[1] < expected[0] and trace.averaged.error <= 1.25 * error)
    assert prefix.digest == (averaged if trace.kept else found).digest


def test_either_may_be_kept(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    text = plain_ids[:64]
    kept = {
        average_first_position(planted_model, planted_model.compute_prefix((token,)), text, np.array(first))[1].kept
        for first in FIRSTS
        for token in (97, 12)
    }
    assert kept == {False, True}


def test_the_mean_does_not_depend_on_how_many_run_at_once(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planted_model.compute_prefix((97,))
    whole = averaged_sink(planted_model, found, plain_ids[:50])
    monkeypatch.setattr("cushion_deploy.prefix.average.ROWS", 7)
    parts = averaged_sink(planted_model, found, plain_ids[:50])
    np.testing.assert_allclose(parts.keys, whole.keys, atol=1e-6)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-6)


def test_a_text_too_short_to_compare_keeps_the_token(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    found = planted_model.compute_prefix((97,))
    prefix, trace = average_first_position(planted_model, found, plain_ids[:16], plain_ids[:8])
    assert (trace.found.later, trace.averaged.later) == (None, None)
    assert prefix is found


def test_what_is_kept_is_decided_by_both_numbers_and_never_by_what_is_not_finite() -> None:
    closer, farther, costly = SinkState(0.1, 7.0), SinkState(0.2, 7.0), SinkState(0.1, 9.0)
    assert Averaging(4, 0, farther, closer, SLACK).kept
    assert not Averaging(4, 0, closer, farther, SLACK).kept
    assert not Averaging(4, 0, farther, costly, SLACK).kept
    for missing in (SinkState.of(np.nan, 7.0), SinkState.of(0.1, np.inf)):
        assert not Averaging(4, 0, farther, missing, SLACK).kept
        assert Averaging(4, 0, missing, closer, SLACK).kept


def test_an_average_that_leaves_the_sink_to_the_text_is_not_kept(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any
) -> None:
    found = planted_model.compute_prefix(plant.absorbers[:1])
    # A token that sees its own class alone has the sink.
    text = np.array([i for i in plain_ids if plant.token_class(i) == plant.token_class(plain_ids[0])])[:48]
    prefix, trace = average_first_position(planted_model, found, text, text, objective="max")
    assert (trace.found.error or np.inf) < plant.massive / 2 < plant.massive < (trace.averaged.error or 0.0)
    assert (trace.averaged.later or 0.0) < (trace.found.later or 0.0)
    assert prefix is found


def test_a_search_averages_over_its_text_but_never_a_seed(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    small = Search(text_tokens=48, random_candidates=8, screen_candidates=8, audit_tokens=0, average_tokens=40)
    prefix, trace = PrefixSearch(planted_model, plain_ids, small).run()
    assert trace.averaging is not None
    assert (trace.averaging.tokens, trace.averaging.chats) == (40, 0)
    tokens = first_tokens(planted_model, plain_ids, small, seed=0)
    averaged = averaged_sink(planted_model, planted_model.compute_prefix(trace.token_ids), tokens)
    assert trace.averaged == trace.averaging.kept == (prefix.digest == averaged.digest)
    assert SearchTrace.from_json(trace.to_json()) == trace
    for settings in ({"average_tokens": 0}, {"seed_tokens": ("a",)}):
        prefix, trace = PrefixSearch(planted_model, plain_ids, small.model_copy(update=settings)).run()
        assert trace.averaging is None
        assert not trace.averaged
        assert prefix.digest == planted_model.compute_prefix(prefix.token_ids).digest


@pytest.mark.parametrize(
    ("template", "share", "chats"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", 0.25, 10),
        ("{{ bos_token }}{{ messages[0].content }}", 1.0, 40),
        ("{{ bos_token }}{{ messages[0].content }}", 0.0, 0),
        ("<|user|>{{ messages[0].content }}{{ bos_token }}", 0.25, 0),
        ("{{ raise_exception('no') }}", 0.25, 0),
        (None, 0.25, 0),
    ],
)
def test_a_share_of_the_mean_is_what_every_chat_begins_with(
    tiny_model: TorchRunner,
    plain_ids: IntArray,
    monkeypatch: pytest.MonkeyPatch,
    template: Any,
    share: float,
    chats: int,
) -> None:
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    tokens = first_tokens(tiny_model, plain_ids, Search(average_tokens=40, average_chats=share), seed=0)
    bos = tiny_model.tokenizer.bos_token_id
    assert len(tokens) == 40
    assert int((tokens == bos).sum()) == chats
    drawn, counts = np.unique(tokens[tokens != bos], return_counts=True)
    available = dict(zip(*np.unique(plain_ids, return_counts=True), strict=True))
    assert all(count <= available[token] for token, count in zip(drawn, counts, strict=True))


@pytest.mark.model
def test_smollm2_is_twice_as_close_to_itself_behind_an_average(smollm2: TorchRunner) -> None:
    found = smollm2.compute_prefix((216,))
    first = np.random.default_rng(0).choice(smollm2.encode(python_topics("calibration").text), 256)
    other = smollm2.encode(python_topics("evaluation").text)[:1024]
    prefix, trace = average_first_position(smollm2, found, other, first, objective="max")
    assert trace.kept
    assert trace.found.later is not None
    assert trace.averaged.later is not None
    assert trace.averaged.later < trace.found.later / 2
    # The sink of the text, 1,871 without a prefix, does not come back.
    assert trace.averaged.error is not None
    assert trace.averaged.error < 100
    assert replace(prefix, keys=found.keys, values=found.values).digest == found.digest
