"""A layer whose weights are read when it runs, and dropped afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from cushion_deploy.core.host import return_freed_memory


class StreamedLayer(AlignDevicesHook):  # type: ignore[misc]
    """accelerate's hook for offloaded weights on a whole layer; the layer can be held for several calls."""

    def __init__(self, weights: Mapping[str, Tensor], path: str, device: torch.device) -> None:
        """Read the tensors of the layer, whose names in ``weights`` begin with ``path``, for a pass on ``device``."""
        by_name = PrefixedDataset(weights, path)
        super().__init__(execution_device=device, offload=True, weights_map=by_name, place_submodules=True)
        self.path = path
        self._is_held = False

    @contextmanager
    def held(self, layer: nn.Module) -> Iterator[None]:
        """Read the weights once, and keep them until the end of the context."""
        super().pre_forward(layer)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            super().post_forward(layer, None)
            return_freed_memory()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the weights unless they are held."""
        return (args, kwargs) if self._is_held else super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Drop the weights unless they are held."""
        if self._is_held:
            return output
        output = super().post_forward(module, output)
        return_freed_memory()
        return output
