"""The rotations of a smoothing in a module: hooks that rotate the inputs of linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.rotation import hadamard, kronecker_factors, rotate
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.families import Family


class InputRotations:
    """Rotates the inputs of a module's linears as one smoothing says, or not at all."""

    def __init__(self, module: nn.Module, family: Family, spec: ModelSpec) -> None:
        """Rotate nothing yet."""
        self._module, self._linears = module, family.linears(spec, head=False)
        self._hooks: list[RemovableHandle] = []

    def follow(self, smoothing: Smoothing | None, device: torch.device, dtype: torch.dtype) -> None:
        """Replace the hooks by those of a smoothing; its matrices are on ``device``, of type ``dtype``."""
        for hook in self._hooks:
            hook.remove()
        rotations = smoothing.rotations if smoothing else {}
        self._hooks = [
            # First of all hooks, so that the others see the rotated input, as the graph's Q does.
            self._module.get_submodule(path).register_forward_pre_hook(_rotation(block, device, dtype), prepend=True)
            for site, block in rotations.items()
            for path in self._linears[site]
        ]


@torch.inference_mode(False)
def _rotation(
    block: int, device: torch.device, dtype: torch.dtype
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that rotates the first argument of a module."""
    matrices = {n: torch.as_tensor(hadamard(n)).to(device, dtype) for n in set(kronecker_factors(block))}
    return lambda _, args: (rotate(args[0], block, matrices.__getitem__), *args[1:])
