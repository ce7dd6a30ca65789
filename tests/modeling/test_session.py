"""The torch model as a decoder session: steps and cuts of the cache give the logits of the whole row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.session import TorchSession


def whole(model: TorchRunner, prefix: tuple[int, ...], ids: IntArray) -> FloatArray:
    """Return transformers' logits of rows behind a prefix that is fed as tokens."""
    before = np.tile(np.asarray(prefix, dtype=np.int64), (len(ids), 1))
    with torch.inference_mode():
        rows = torch.from_numpy(np.concatenate([before, ids], axis=1))
        logits: FloatArray = model.module(input_ids=rows).logits[:, len(prefix) :].numpy()
    return logits


@pytest.mark.parametrize("prefix", [(), (7, 1, 300)])
def test_steps_and_cuts_give_the_logits_of_the_whole_row(
    tiny_model: TorchRunner, plain_ids: IntArray, prefix: tuple[int, ...]
) -> None:
    ids = plain_ids[:40].reshape(2, 20)
    expected = whole(tiny_model, prefix, ids)
    session = TorchSession(tiny_model, tiny_model.compute_prefix(prefix))
    assert session.contract.prefix_length == len(prefix)
    found = session.run(ids[:, :9], need_logits="all")
    np.testing.assert_allclose(found, expected[:, :9], atol=2e-4)
    assert session.run(ids[:, 9:12], need_logits="none") is None
    last = session.run(ids[:, 12:], need_logits="last")
    np.testing.assert_allclose(last, expected[:, -1:], atol=2e-4)
    assert session.length == 20
    for kept in (15, 4, 0):
        session.truncate(kept)
        assert session.length == kept
        np.testing.assert_allclose(session.run(ids[:, kept:], need_logits="all"), expected[:, kept:], atol=2e-4)
    session.reset()
    np.testing.assert_allclose(session.run(ids, need_logits="all"), expected, atol=2e-4)


def test_what_it_cannot_run_is_refused(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    session = TorchSession(tiny_model, tiny_model.compute_prefix((7, 1)))
    session.run(plain_ids[None, :10])
    with pytest.raises(UsageError, match="longer than the 254"):
        session.run(plain_ids[None, :245])
    with pytest.raises(UsageError, match="cannot keep 11"):
        session.truncate(11)
    with pytest.raises(UsageError, match="mask"):
        session.run(plain_ids[None, :2], np.ones((1, 12), dtype=np.int64))
    assert session.length == 10
