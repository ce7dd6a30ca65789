"""Observing shows what enters a linear; replacing changes it, once for linears that share it; both clean up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.sites import Site, layer_site
from cushion_deploy.modeling.observe import observed, replaced
from cushion_deploy.modeling.runner import TorchRunner


@pytest.fixture
def ids(plain_ids: IntArray) -> Tensor:
    return torch.from_numpy(plain_ids[:24].reshape(2, 12))


def hooks(model: TorchRunner) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules())


@torch.inference_mode()
def test_each_site_is_seen_once_with_the_input_of_its_linears(tiny_model: TorchRunner, ids: Tensor) -> None:
    seen: list[tuple[Site, Tensor]] = []
    outputs: dict[nn.Module, Tensor] = {}
    linears = [linear for group in tiny_model.sites.values() for linear in group]
    handles = [m.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out)) for m in linears]
    with observed(tiny_model, lambda site, x: seen.append((site, x))):
        tiny_model.module(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert [site for site, _ in seen] == list(tiny_model.sites)
    for site, x in seen:
        for linear in tiny_model.sites[site]:
            torch.testing.assert_close(nn.functional.linear(x, linear.weight), outputs[linear])


@torch.inference_mode()
def test_a_replaced_input_reaches_all_linears_of_its_site_and_is_computed_once(
    tiny_model: TorchRunner, ids: Tensor
) -> None:
    site = layer_site(1, "attn.qkv")
    calls, inputs = [], []

    def halve(name: Site, x: Tensor) -> Tensor:
        calls.append(name)
        return x * 0.5

    handles = [m.register_forward_hook(lambda _, args, __: inputs.append(args[0])) for m in tiny_model.sites[site]]
    with replaced(tiny_model, halve, {site: tiny_model.sites[site]}):
        tiny_model.module(input_ids=ids)
        changed = list(inputs)
        inputs.clear()
    tiny_model.module(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert calls == [site]
    assert len(changed) == len(inputs) == 3
    for new, old in zip(changed, inputs, strict=True):
        torch.testing.assert_close(new, old * 0.5)


@torch.inference_mode()
def test_a_second_pass_is_computed_anew(tiny_model: TorchRunner, ids: Tensor) -> None:
    calls: list[Site] = []

    def same(site: Site, x: Tensor) -> Tensor:
        calls.append(site)
        return x

    with replaced(tiny_model, same, tiny_model.sites):
        first = tiny_model.module(input_ids=ids).logits
        other = tiny_model.module(input_ids=ids.flip(0)).logits
    assert calls == 2 * list(tiny_model.sites)
    torch.testing.assert_close(other, first.flip(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("look", [observed, lambda model, act: replaced(model, act, model.sites)])
def test_no_hook_stays_behind_not_even_after_an_error(tiny_model: TorchRunner, ids: Tensor, look: Any) -> None:
    before = hooks(tiny_model)

    def fail(site: Site, x: Tensor) -> Tensor:
        raise RuntimeError(site)

    with pytest.raises(RuntimeError, match=r"layers\.0\.attn\.qkv"), look(tiny_model, fail):
        tiny_model.module(input_ids=ids)
    assert hooks(tiny_model) == before
