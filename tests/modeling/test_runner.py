"""Running behind a prefix equals what transformers computes over prefix and text together, whatever the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.families.folding import absorbers
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.past_key_values import keys_values, new_cache
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.source import resolve_source

TOKENS = (7, 1, 300)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def text(plain_ids: IntArray) -> IntArray:
    """Return two rows of 20 tokens."""
    return plain_ids[:40].reshape(2, 20)


def plain_logits(model: TorchRunner, ids: list[int]) -> np.ndarray:
    """Return what transformers says without any cache, ``[length, vocab]``."""
    with torch.inference_mode():
        return model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def test_the_prefix_is_what_transformers_caches_for_its_tokens(tiny_model: TorchRunner) -> None:
    with torch.inference_mode():
        cache = tiny_model.module(input_ids=torch.tensor([TOKENS]), use_cache=True).past_key_values
    prefix = tiny_model.compute_prefix(TOKENS)
    assert prefix.keys.shape == (3, 2, 3, 16)
    assert prefix.keys.dtype == np.float32
    for layer in range(3):
        np.testing.assert_allclose(prefix.keys[layer], cache.layers[layer].keys[0], **CLOSE)
        np.testing.assert_allclose(prefix.values[layer], cache.layers[layer].values[0], **CLOSE)
    assert (prefix.token_ids, prefix.model_digest) == (TOKENS, tiny_model.spec.weights_digest)


def test_keys_are_stored_after_rotation(tiny_model: TorchRunner) -> None:
    # The first layer's keys depend on token and position alone: the same token twice differs by its rotation.
    keys = tiny_model.compute_prefix((7, 7)).keys[0]
    angle = 10000.0 ** (-np.arange(8) / 8)
    first, second = keys[:, 0], keys[:, 1]
    low, high = first[:, :8], first[:, 8:]
    turned = [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)]
    np.testing.assert_allclose(second, np.concatenate(turned, axis=1), **CLOSE)


def test_no_tokens_make_the_empty_prefix(tiny_model: TorchRunner) -> None:
    prefix = tiny_model.compute_prefix(())
    assert prefix.length == 0
    assert prefix.digest == Prefix.empty(tiny_model.spec).digest


@pytest.mark.parametrize("tokens", [(), (1,), TOKENS])
def test_logits_are_those_of_prefix_and_text_together(
    tiny_model: TorchRunner, text: IntArray, tokens: tuple[int, ...]
) -> None:
    behind = tiny_model.logits(text, tiny_model.compute_prefix(tokens))
    assert behind.shape == (2, 20, 320)
    for row in range(2):
        whole = plain_logits(tiny_model, [*tokens, *text[row].tolist()])
        np.testing.assert_allclose(behind[row], whole[len(tokens) :], **CLOSE)


def test_a_prefix_changes_the_logits(tiny_model: TorchRunner, text: IntArray) -> None:
    empty = Prefix.empty(tiny_model.spec)
    difference = tiny_model.logits(text, tiny_model.compute_prefix(TOKENS)) - tiny_model.logits(text, empty)
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [(), TOKENS])
def test_a_padded_batch_equals_its_rows_alone(
    tiny_model: TorchRunner, plain_ids: IntArray, tokens: tuple[int, ...], side: str
) -> None:
    rows = [plain_ids[:12], plain_ids[20:27], plain_ids[40:41]]
    ids, mask = np.full((3, 12), 9), np.zeros((3, 12), dtype=np.int64)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    past = tiny_model.past(tiny_model.compute_prefix(tokens))
    with torch.inference_mode():
        found = tiny_model.run(torch.from_numpy(ids), past, torch.from_numpy(mask)).logits.numpy()
    for i, row in enumerate(rows):
        alone = plain_logits(tiny_model, [*tokens, *row.tolist()])[len(tokens) :]
        np.testing.assert_allclose(found[i][mask[i] == 1], alone, **CLOSE)


def test_a_run_leaves_the_prefix_as_it_was(tiny_model: TorchRunner, text: IntArray) -> None:
    past = tiny_model.past(tiny_model.compute_prefix(TOKENS))
    copies = [(k.clone(), v.clone()) for k, v in past.layers]
    with torch.inference_mode():
        output = tiny_model.run(torch.from_numpy(text), past, keep_cache=True)
    assert output.past_key_values.get_seq_length() == 3 + 20
    for (k, v), (k0, v0) in zip(past.layers, copies, strict=True):
        assert torch.equal(k, k0)
        assert torch.equal(v, v0)


def test_the_cache_goes_on_where_the_text_ended(tiny_model: TorchRunner, text: IntArray) -> None:
    prefix = tiny_model.compute_prefix(TOKENS)
    with torch.inference_mode():
        out = tiny_model.run(torch.from_numpy(text[:1, :19]), tiny_model.past(prefix), keep_cache=True)
        past = keys_values(out.past_key_values)
        last = tiny_model.run(torch.from_numpy(text[:1, 19:]), past).logits[0, 0].numpy()
    np.testing.assert_allclose(last, plain_logits(tiny_model, [*TOKENS, *text[0].tolist()])[-1], **CLOSE)


def test_the_cache_of_an_empty_prefix_is_empty(tiny_model: TorchRunner) -> None:
    past = tiny_model.past(Prefix.empty(tiny_model.spec))
    assert new_cache(past, 4, keep=True).get_seq_length() == 0


def test_losses_are_transformers_own(tiny_model: TorchRunner, text: IntArray) -> None:
    nll = tiny_model.token_nll(text, Prefix.empty(tiny_model.spec))
    assert nll.shape == (2, 19)
    for row in range(2):
        ids = torch.from_numpy(text[row : row + 1])
        with torch.inference_mode():
            loss = float(tiny_model.module(input_ids=ids, labels=ids).loss)
        assert float(nll[row].mean()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tokens", [(), TOKENS])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_that_is_not_kept_changes_no_bit_and_stores_only_the_prefix(
    tiny_model: TorchRunner, text: IntArray, tokens: tuple[int, ...], padded: bool
) -> None:
    past, ids, mask = tiny_model.past(tiny_model.compute_prefix(tokens)), tiny_model.tensor(text), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
    with torch.inference_mode():
        kept, dropped = (tiny_model.run(ids, past, mask, keep_cache=keep) for keep in (True, False))
    assert torch.equal(kept.logits, dropped.logits)
    lengths = [output.past_key_values.get_seq_length() for output in (kept, dropped)]
    assert lengths == [len(tokens) + 20, len(tokens)]


def test_embeddings_run_like_the_tokens_that_they_belong_to(tiny_model: TorchRunner, text: IntArray) -> None:
    ids, past = tiny_model.tensor(text), tiny_model.past(tiny_model.compute_prefix(TOKENS))
    with torch.inference_mode():
        embeddings = tiny_model.module.get_input_embeddings()(ids)
        assert torch.equal(tiny_model.run(embeddings, past).logits, tiny_model.run(ids, past).logits)


def test_the_greedy_continuation_is_that_of_generate(tiny_model: TorchRunner, text: IntArray) -> None:
    full = torch.tensor([[*TOKENS, *text[0].tolist()]])
    expected = tiny_model.module.generate(
        full, attention_mask=torch.ones_like(full), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    found = tiny_model.greedy(text[:1], tiny_model.compute_prefix(TOKENS), 8)
    assert found == tuple(expected[0, full.shape[1] :].tolist())


def test_arrays_and_tensors_keep_type_and_values(tiny_model: TorchRunner) -> None:
    for array in (np.arange(6).reshape(2, 3), np.float32([0.1, -3]), np.int8([5]), np.array([True, False])):
        tensor = tiny_model.tensor(array)
        assert tensor.device == tiny_model.device
        found = tiny_model.array(tensor)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert tiny_model.tensor(np.float32(0.1)).item() == np.float32(0.1)
    assert tiny_model.tensor([(1, 2)]).dtype == torch.int64
    assert tiny_model.array(torch.nn.Parameter(torch.ones(2))).tolist() == [1, 1]


def smoothing_of(model: TorchRunner, value: float) -> Smoothing:
    """Return the same factor for every channel."""
    sites = absorbers(model.family, model.spec)
    factors = {site: np.full(model.sites[site][0].in_features, value, np.float32) for site in sites}
    return Smoothing(factors, 0.5, model.digest)


def test_views_with_different_smoothings_share_one_module(tiny_model: TorchRunner) -> None:
    first, second = smoothing_of(tiny_model, 2.0), smoothing_of(tiny_model, 3.0)
    folded = tiny_model.folded(first)
    assert (folded.smoothing, folded.digest) == (first, tiny_model.digest)
    assert folded.module is tiny_model.module
    assert folded.folded(first) is folded
    assert tiny_model.folded(None) is tiny_model
    assert tiny_model.folded(Smoothing({}, 0.5, tiny_model.digest)) is tiny_model
    for other in (second, None):
        with pytest.raises(UsageError, match="another smoothing is already folded"):
            folded.folded(other)
    assert tiny_model.folded(second).smoothing is second


def test_no_other_view_runs_while_weights_are_quantized(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    folded, ids = tiny_model.folded(smoothing_of(tiny_model, 2.0)), plain_ids[None, :8]
    none = Prefix.empty(tiny_model.spec)
    before = folded.logits(ids, none)
    with simulated(folded, QuantScheme(), None):
        with pytest.raises(UsageError, match="another smoothing"):
            tiny_model.logits(ids, none)
        assert not np.array_equal(folded.logits(ids, none), before)
    np.testing.assert_array_equal(folded.logits(ids, none), before)


def test_unloaded_weights_come_back_with_the_next_pass(tiny_folder: Path, plain_ids: IntArray) -> None:
    model, ids = load_folder(tiny_folder, resolve_source(str(tiny_folder))), plain_ids[None, :8]
    none = Prefix.empty(model.spec)
    before, folded = model.logits(ids, none), model.folded(smoothing_of(model, 2.0))
    after = folded.logits(ids, none)
    with simulated(folded, QuantScheme(), None), pytest.raises(UsageError, match="cannot be unloaded"):
        model.placed.unload()
    for view, expected in ((model, before), (folded, after)):
        model.placed.unload()
        assert all(p.is_meta for p in model.transformer.parameters())
        assert model.placed.resident_bytes == 0
        np.testing.assert_array_equal(view.logits(ids, none), expected)
