"""Run many batches through a model layer by layer: all of them pass a layer before the next one is loaded.

The code of transformers around the layers runs unchanged, in three parts: what comes before the layers, with stand-ins
for the layers that record their arguments; every layer with the recorded arguments; and what comes after the layers,
with stand-ins that return the output of the last layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recorded(Exception):
    """Ends a pass after the stand-in of the last layer."""


@dataclass
class LayerCalls:
    """The output of one batch between two layers, and the arguments of every layer.

    Attributes:
        output: what the last layer returned: the states ``[batch, length, hidden]``, or a tuple that begins with them.
        arguments: positional (without the states) and keyword arguments of each layer.
    """

    output: Any = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, layer: nn.Module, number: int) -> None:
        """Run a layer on the output of the one before it."""
        args, kwargs = self.arguments[number]
        self.output = layer(_states(self.output), *args, **kwargs)
        self.arguments[number] = ((), {})  # each layer runs once: its masks are not needed any more


def record_calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> LayerCalls:
    """Return the states before the first layer and the arguments of every layer in the pass that ``run`` runs."""
    calls = LayerCalls()

    def stand_in(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        calls.output = _states(hidden_states)
        calls.arguments.append((args, kwargs))
        if len(calls.arguments) == len(layers):
            raise _Recorded
        # A tuple for decoders that take its first element; the others pass it on to the next stand-in as it is.
        return (calls.output,)

    with _replaced(layers, stand_in), suppress(_Recorded):
        run()
    return calls


def finish_pass(layers: Sequence[nn.Module], calls: LayerCalls, run: Callable[[], Any]) -> Any:
    """Return the output of the pass that ``run`` runs, with the given output in place of that of the last layer."""
    with _replaced(layers, lambda *_, **__: calls.output):
        return run()


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward function of every layer within the context."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, forward))
            # Stand-ins have no output to observe.
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                stack.callback(setattr, layer, hooks, getattr(layer, hooks))
                setattr(layer, hooks, OrderedDict())
        yield


@contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward function of a layer within the context, on top of the one that accelerate put there."""
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run every layer again for its gradient instead of keeping what it computes, and a streamed one its weights."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, _checkpointed(layer.forward)))
        yield


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
