"""Look at, or replace, what enters each Site while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cushion_deploy.types import Site

Sites = Mapping[Site, tuple[nn.Linear, ...]]


@contextmanager
def observed(sites: Sites, callback: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call ``callback(site, x)`` with the input ``[batch, length, features]`` of every Site, once a forward pass.

    The linears of one Site share their input, so the hook stands on the first alone.
    """
    with ExitStack() as stack:
        for site, linears in sites.items():

            def hook(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                callback(site, args[0])

            stack.callback(linears[0].register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def replaced(sites: Sites, transform: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """Feed ``transform(site, x)`` to the linears of every Site instead of ``x``; computed once for those that share."""
    with ExitStack() as stack:
        for site, linears in sites.items():
            memo: list[tuple[Tensor, Tensor]] = []

            def hook(
                _: nn.Module, args: tuple[Any, ...], site: Site = site, memo: list[tuple[Tensor, Tensor]] = memo
            ) -> tuple[Any, ...]:
                x = args[0]
                if not memo or memo[0][0] is not x:
                    memo[:] = [(x, transform(site, x))]
                return (memo[0][1], *args[1:])

            for linear in linears:
                stack.callback(linear.register_forward_pre_hook(hook).remove)
            stack.callback(memo.clear)
        yield
