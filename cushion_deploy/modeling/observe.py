"""Look at, or replace, what enters each Site while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.load import LoadedModel

Sites = Mapping[Site, tuple[nn.Linear, ...]]


@contextmanager
def observed(
    model: LoadedModel, callback: Callable[[Site, Tensor], None], sites: Sites | None = None
) -> Iterator[None]:
    """Call ``callback(site, x)`` with the input ``[batch, length, features]`` of every Site, once a forward pass.

    The linears of one Site share their input, so the hook stands on the first alone.

    Args:
        model: the model.
        callback: gets each Site in the order of the computation.
        sites: those to look at; None for all.
    """
    with ExitStack() as stack:
        batch = stack.enter_context(_batch_under_way(model))
        for site, linears in (model.sites if sites is None else sites).items():

            def hook(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                callback(site, _apart(args[0], batch[0]))

            stack.callback(linears[0].register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def replaced(model: LoadedModel, transform: Callable[[Site, Tensor], Tensor], sites: Sites) -> Iterator[None]:
    """Feed ``transform(site, x)`` to the linears of these Sites instead of ``x``; computed once for those that share.

    ``x`` is ``[batch, length, features]``, and so is what replaces it.
    """
    with ExitStack() as stack:
        batch = stack.enter_context(_batch_under_way(model))
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
                    memo[:] = [x, *[transform(site, _apart(x, batch[0])).reshape(x.shape)] * sharers]
                found = memo.pop()
                # Once each has had it, it is forgotten: a layer that is run again may get the very same x.
                if len(memo) == 1:
                    memo.clear()
                return (found, *args[1:])

            for linear in linears:
                stack.callback(linear.register_forward_pre_hook(hook).remove)
            stack.callback(memo.clear)
        yield


@contextmanager
def _batch_under_way(model: LoadedModel) -> Iterator[list[int]]:
    """Yield a list whose one element is the batch size of the forward pass under way."""
    batch = [1]

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        batch[0] = next(len(tensor) for tensor in given if tensor is not None)

    handle = model.decoder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield batch
    finally:
        handle.remove()


def _apart(x: Tensor, batch: int) -> Tensor:
    """Return ``[batch, length, features]``; OPT feeds its MLP with batch and length as one axis."""
    return x if x.dim() == 3 else x.reshape(batch, -1, x.shape[-1])
