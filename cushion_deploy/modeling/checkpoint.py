"""The safetensors files of a model folder: whole tensors for torch, and rows as numpy arrays for export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.families import Family
from cushion_deploy.modeling.quantized_formats import StoredFormat
from cushion_deploy.modeling.source import weight_files
from cushion_deploy.modeling.stored_tensor import (
    PACKED,
    SCALES,
    SHAPE,
    ZERO_POINT,
    StoredTensor,
    packed_weight,
    with_scales,
)
from cushion_deploy.modeling.unused_tensors import Harmless, harmless_kinds

TOWERS = ("language_model.model.", "language_model.lm_head.", "model.language_model.", "model.text_model.")
"""Where checkpoints of several modalities have the decoder and its head."""
COMPARED = 4096
"""Rows that are compared at once."""


class Checkpoint:
    """A ``WeightSource`` of the tensors in a folder, by their names in the module; nothing is kept in memory.

    Linears that a family stores as ``[in, out]`` are returned as ``[out, in]``, as in torch. FP8, INT8 and packed INT4
    weights are dequantized with the scales beside them.
    """

    def __init__(self, folder: Path, family: Family, form: StoredFormat | None = None) -> None:
        """Index the safetensors files of ``folder``; ``form`` is what its configuration says of quantized weights.

        Raises:
            UntrustedArtifact: a file is damaged.
            UsageError: two tensors have the same name in the module, or the meaning of packed codes is not certain.
        """
        self._family, self._form = family, form
        self._transposed = tuple(f".{part}.weight" for part in family.transposed)
        self._finite: set[str] = set()
        self._found: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as f:
                    for key in list(f.keys()):
                        part = f.get_slice(key)
                        self._add(StoredTensor(file, key, part.get_dtype(), tuple(part.get_shape())))
            except SafetensorError as e:
                raise UntrustedArtifact(f"{file.name} is damaged: {e}", hint="fetch the model again") from e
        for name in [name for name in self._found if name.endswith(f".{PACKED}")]:
            self._pair(name.removesuffix(PACKED))

    def _pair(self, base: str) -> None:
        """Put a weight in the place of its packed codes and what belongs to them, so that it has its own shape."""
        name = f"{base}weight"
        parts = {
            s: self._found.pop(base + s) for s in (PACKED, SHAPE, SCALES[0], ZERO_POINT) if base + s in self._found
        }
        if name in self._found:
            raise UsageError(
                f"{name} is there twice: as it is, and packed as {parts[PACKED].key}",
                hint="remove one of them, or fetch the model again",
            )
        self._found[name] = packed_weight(name, parts[PACKED], parts, self._form)

    def _add(self, tensor: StoredTensor) -> None:
        name = _name_in_module(tensor.key, self._family)
        if earlier := self._found.get(name):
            places = [f"{found.key} in {found.file.name}" for found in (earlier, tensor)]
            raise UsageError(
                f"{name} is there twice: as {' and as '.join(places)}",
                hint="remove one of them, or fetch the model again",
            )
        self._found[name] = tensor

    def keep(self, names: Collection[str], layers: int, further_layers: int = 0) -> dict[Harmless, int]:
        """Drop all tensors but these, and pair quantized weights with their scales.

        Args:
            names: the tensors of the module.
            layers: layers of the model.
            further_layers: layers behind them that predict further tokens, as the configuration says.

        Returns:
            What is left out, by kind, with the number of tensors.

        Raises:
            UsageError: what is left out could change the model, or the meaning of stored numbers is not certain.
        """
        kept: dict[str, StoredTensor] = {}
        used: set[str] = set()
        for name in self._found.keys() & names:
            if self._found[name].packing:  # it has its scales already
                kept[name] = self._found[name]
                continue
            base = name.removesuffix("weight")
            beside = {
                s: self._found[base + s] for s in (*SCALES, ZERO_POINT) if base != name and base + s in self._found
            }
            kept[name] = with_scales(name, self._found[name], beside, self._form)
            used |= {base + suffix for suffix in beside}
        unused = {name: self._found[name] for name in self._found.keys() - kept.keys() - used}
        by_key = {tensor.key: tensor for tensor in unused.values()}
        left_out = harmless_kinds(
            by_key, lambda key: not bool(by_key[key].read().count_nonzero()), layers, further_layers
        )
        self._found = kept
        return left_out

    def untie(self, head: str, embedding: str) -> bool:
        """Return whether a head that the configuration ties to the embedding is another matrix in the file.

        A copy of the embedding is dropped; a head without an embedding takes its place, as in transformers.
        """
        if head not in self._found:
            return False
        if embedding not in self._found:
            self._found[embedding] = self._found.pop(head)
            return False
        if self._equal(self._found[head], self._found[embedding]):
            del self._found[head]
            return False
        return True

    def _equal(self, one: StoredTensor, other: StoredTensor) -> bool:
        if (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2:
            return False
        pieces = (slice(start, start + COMPARED) for start in range(0, one.shape[0], COMPARED))
        return all(torch.equal(one.read(piece), other.read(piece)) for piece in pieces)

    def quantized(self) -> Counter[str]:
        """Return how many tensors are stored in each type that is dequantized, by its name in safetensors."""
        return Counter(t.dtype for t in self._found.values() if t.scale is not None or t.dtype.startswith("F8"))

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return frozenset(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; raises KeyError for an unknown name."""
        shape = self._found[name].shape
        return shape[::-1] if self._is_transposed(name) else shape

    def tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor, converted on the device.

        Raises:
            KeyError: there is no tensor of this name.
            UsageError: it contains NaN or infinity, in the file or in this type.
        """
        stored = self._found[name].read()
        # A copy even where nothing is converted: a tensor of the mapped file would change with the file.
        found: Tensor = stored.to(device).to(dtype, copy=device == stored.device)
        if name not in self._finite:
            _require_finite(name, self._found[name], stored, found)
            self._finite.add(name)
        if self._is_transposed(name):
            found = found.T.contiguous()
        return found

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Return ``tensor[start:stop]`` as float32; raises KeyError for an unknown name."""
        stored, part = self._found[name], slice(start, stop)
        read = stored.read(slice(None), part).T.contiguous() if self._is_transposed(name) else stored.read(part)
        found: FloatArray = read.to(torch.float32).numpy()
        return found

    def _is_transposed(self, name: str) -> bool:
        return name.endswith(self._transposed)


def _name_in_module(key: str, family: Family) -> str:
    """Return the name in the module of a tensor: older checkpoints leave out, and those of several modalities add."""
    base = family.layers.partition(".")[0]
    for tower in TOWERS:
        if key.startswith(tower):
            rest = key.removeprefix(tower)
            return f"{family.head}.{rest}" if tower.endswith(".lm_head.") else f"{base}.{rest}"
    return key if key.startswith((f"{base}.", f"{family.head}.")) else f"{base}.{key}"


def _require_finite(name: str, tensor: StoredTensor, stored: Tensor, found: Tensor) -> None:
    """Raise UsageError if a tensor contains a number that is not finite; ``stored`` is as read, ``found`` converted."""
    # The sum first, because it needs no memory; it may overflow where no number does.
    if not found.numel() or found.sum(dtype=torch.float32).isfinite() or found.isfinite().all():
        return
    place = (~found.isfinite()).nonzero()[0].tolist()
    where, value = f"{name}{place}", float(stored[tuple(place)])
    if not torch.tensor(value).isfinite():
        raise UsageError(
            f"{where} is {value} in {tensor.file.name}: a weight has to be a number",
            hint="fetch the model again; if the file is as its author published it, the training has failed",
        )
    raise UsageError(
        f"{where} is {value:g} in {tensor.file.name}, which {str(found.dtype).removeprefix('torch.')} cannot hold",
        hint="choose another type with --dtype bf16 or --dtype fp32",
    )
