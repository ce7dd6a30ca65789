"""Layer magnitudes against transformers' own hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.magnitudes import layer_magnitudes
from cushion_deploy.modeling.runner import TorchRunner


@pytest.mark.parametrize("tokens", [(), (65, 9)])
def test_magnitudes_are_those_of_the_text_tokens_alone(
    planted_model: TorchRunner, plain_ids: IntArray, tokens: tuple[int, ...]
) -> None:
    ids, states = plain_ids[None, :31], []
    layers = planted_model.module.model.layers
    handles = [layer.register_forward_hook(lambda _, __, out: states.append(out)) for layer in layers]
    with torch.inference_mode():
        planted_model.module(input_ids=torch.tensor([[*tokens, *ids[0].tolist()]]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = layer_magnitudes(planted_model, planted_model.compute_prefix(tokens), ids)
    assert [m["layer"] for m in found] == [0, 1, 2]
    for magnitudes, state in zip(found, states, strict=True):
        values = np.sort(np.abs(state[0, len(tokens) :].numpy().ravel()))
        top = [magnitudes[f"top{i}"] for i in (1, 2, 3)]
        np.testing.assert_allclose(top, values[[-1, -2, -3]], rtol=1e-4)
        # torch takes the lower of the two middle values.
        assert magnitudes["median"] == pytest.approx(values[(len(values) - 1) // 2], rel=1e-4)


def test_the_planted_sink_shows_without_a_prefix_and_not_behind_an_absorber(
    planted_model: TorchRunner, plain_ids: IntArray
) -> None:
    def largest(prefix: Prefix) -> float:
        return max(m["top1"] / m["median"] for m in layer_magnitudes(planted_model, prefix, plain_ids[None, :64]))

    assert largest(Prefix.empty(planted_model.spec)) > 3 * largest(planted_model.compute_prefix((65,)))
