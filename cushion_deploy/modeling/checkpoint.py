"""The safetensors files of a model folder: whole tensors for torch, and rows as numpy arrays for export."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.families import Family
from cushion_deploy.modeling.source import weight_files


class Checkpoint:
    """A ``WeightSource`` of the tensors in a folder, by their names in the module; nothing is kept in memory.

    Linears that a family stores as ``[in, out]`` are returned as ``[out, in]``, as in torch.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        """Index the safetensors files of ``folder``; raises UntrustedArtifact if one is damaged."""
        # Tensor names in older checkpoints lack the name of the decoder.
        base = family.layers.partition(".")[0]
        self._found: dict[str, tuple[Path, str]] = {}
        self._transposed = tuple(f".{part}.weight" for part in family.transposed)
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as f:
                    for key in list(f.keys()):
                        whole = key if key.startswith((f"{base}.", f"{family.head}.")) else f"{base}.{key}"
                        self._found[whole] = (file, key)
            except SafetensorError as e:
                raise UntrustedArtifact(f"{file.name} is damaged: {e}", hint="fetch the model again") from e

    def keep(self, names: Collection[str]) -> None:
        """Drop all tensors but these: a file may hold tensors that the configuration does not use."""
        self._found = {name: place for name, place in self._found.items() if name in names}

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return frozenset(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; raises KeyError for an unknown name."""
        file, key = self._found[name]
        with safe_open(file, framework="pt") as f:
            shape = tuple(f.get_slice(key).get_shape())
        return shape[::-1] if self._is_transposed(name) else shape

    def tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor, converted on the device; raises KeyError for an unknown name."""
        file, key = self._found[name]
        with safe_open(file, framework="pt") as f:
            stored = f.get_tensor(key)
        # A copy even where nothing is converted: a tensor of the mapped file would change with the file.
        found: Tensor = stored.to(device).to(dtype, copy=device == stored.device)
        if self._is_transposed(name):
            found = found.T.contiguous()
        return found

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Return ``tensor[start:stop]`` as float32; raises KeyError for an unknown name."""
        file, key = self._found[name]
        with safe_open(file, framework="pt") as f:
            stored = f.get_slice(key)
            part = stored[:, start:stop].T.contiguous() if self._is_transposed(name) else stored[start:stop]
            found: FloatArray = part.to(torch.float32).numpy()
            return found

    def _is_transposed(self, name: str) -> bool:
        return name.endswith(self._transposed)
