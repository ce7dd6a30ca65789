"""Observe or replace the input of each Site during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.runner import TorchRunner

Sites = Mapping[Site, tuple[nn.Linear, ...]]


@contextmanager
def observed(
    model: TorchRunner, callback: Callable[[Site, Tensor], None], sites: Sites | None = None
) -> Iterator[None]:
    """Call ``callback(site, x)`` with the input ``[batch, length, features]`` of every Site, once per forward pass.

    The linears of one Site share their input, so only the first has a hook. In a sweep, which computes no logits, the
    head is observed at the last hidden states.

    Args:
        model: the model.
        callback: called for each Site in the order of computation.
        sites: the Sites to observe; None for all.
    """
    chosen = model.sites if sites is None else sites
    with ExitStack() as stack:
        for site, linears in chosen.items():

            def hook(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                callback(site, model.current.with_batch_axis(args[0]))

            stack.callback(linears[0].register_forward_pre_hook(hook).remove)
        if HEAD_SITE in chosen:
            stack.enter_context(model.watching_head(lambda hidden: callback(HEAD_SITE, hidden)))
        yield


@contextmanager
def replaced(model: TorchRunner, transform: Callable[[Site, Tensor], Tensor], sites: Sites) -> Iterator[None]:
    """Replace the input ``x`` of these Sites by ``transform(site, x)``, computed once for all linears of a Site.

    Input and replacement are ``[batch, length, features]``.
    """
    with ExitStack() as stack:
        for site, linears in sites.items():
            memo: list[Tensor] = []

            def hook(
                _: nn.Module,
                args: tuple[Any, ...],
                site: Site = site,
                memo: list[Tensor] = memo,
                sharers: int = len(linears),
            ) -> tuple[Any, ...]:
                x = args[0]
                if not memo or memo[0] is not x:
                    memo[:] = [x, *[transform(site, model.current.with_batch_axis(x)).reshape(x.shape)] * sharers]
                found = memo.pop()
                # Dropped once every linear has used it: a layer that is run again may get the very same x.
                if len(memo) == 1:
                    memo.clear()
                return (found, *args[1:])

            for linear in linears:
                stack.callback(linear.register_forward_pre_hook(hook).remove)
            stack.callback(memo.clear)
        yield
