"""A tensor in a safetensors file, read whole or in part; quantized weights are dequantized with their scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.packing import Packing
from cushion_deploy.modeling.quantized_formats import ORIGINAL, StoredFormat

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
INT8 = "I8"
SCALES = ("weight_scale", "weight_scale_inv")
"""Names beside ``weight``. Both multiply: the inverse of DeepSeek is that of the factor used in quantizing."""
ZERO_POINT = "weight_zero_point"
PACKED, SHAPE = "weight_packed", "weight_shape"
"""Names in the place of ``weight`` and beside it, where several codes are packed into a word."""
USUAL_BLOCK = 128
"""Block of the FP8 checkpoints that state none."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        file, key: where it is.
        dtype: the name of its type in safetensors.
        shape: its shape.
        scale, zero_point: of a quantized weight ``[out, in]``; its value is ``(code - zero_point) * scale``.
        block: elements ``[out, in]`` of the weight that share a scale.
        packing: how its codes lie in words; ``dtype`` and ``shape`` are those of the codes. None if they do not.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    scale: StoredTensor | None = None
    zero_point: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)
    packing: Packing | None = None

    def read(self, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Return the tensor, or some rows (and columns) of it: dequantized in float32, or of the stored type."""
        with safe_open(self.file, framework="pt") as f:
            found: Tensor
            if self.packing:
                codes = self.packing.unpack(f.get_slice(self.key)[rows])
                found = codes if columns is None else codes[:, columns]
            elif rows == slice(None) and columns is None:
                found = f.get_tensor(self.key)
            else:
                part = f.get_slice(self.key)
                found = part[rows] if columns is None else part[rows, columns]
        if self.scale is None:
            return found.float() if self.dtype in FP8 else found
        codes = found.float()
        if self.zero_point is not None:
            codes = codes - self._spread(self.zero_point, rows, columns)
        return codes * self._spread(self.scale, rows, columns)

    def _spread(self, values: StoredTensor, rows: slice, columns: slice | None) -> Tensor:
        """Return scales or zero points, float32, in a shape that broadcasts over the given part of the weight."""
        table = values.read().float()
        table = table.reshape(-1, 1) if table.dim() < 2 else table
        for axis, (part, size) in enumerate(((rows, self.block[0]), (columns or slice(None), self.block[1]))):
            if table.shape[axis] > 1:
                places = torch.arange(*part.indices(self.shape[axis])) // size
                table = table.index_select(axis, places)
        return table


def with_scales(
    name: str, weight: StoredTensor, beside: dict[str, StoredTensor], form: StoredFormat | None
) -> StoredTensor:
    """Return a weight with what dequantizes it.

    Args:
        name: of the weight, for messages.
        weight: as it is stored.
        beside: :data:`SCALES` and :data:`ZERO_POINT` as far as the checkpoint has them for this weight.
        form: what the configuration says; None if it says nothing.

    Raises:
        UsageError: the meaning of the stored numbers is not certain.
    """
    scales = [beside[suffix] for suffix in SCALES if suffix in beside]
    if not scales and ZERO_POINT in beside:
        raise UsageError(f"{name} has zero points beside it and no scale", hint=ORIGINAL)
    if weight.dtype in FLOATS:
        if scales and not (form and form.floats):
            raise UsageError(
                f"{name} is in floating point ({weight.dtype}) and has a scale beside it: whether that is to be "
                "multiplied in is not certain",
                hint=ORIGINAL,
            )
        return weight
    if weight.dtype not in (*FP8, INT8):
        raise UsageError(
            f"{name} is stored as {weight.dtype}, expected a floating-point type, or FP8 or INT8 with a scale",
            hint=ORIGINAL,
        )
    if len(scales) > 1:
        raise UsageError(f"{name} has two scales beside it: {', '.join(SCALES)}", hint=ORIGINAL)
    if not scales and (weight.dtype == INT8 or form is not None):
        raise UsageError(f"{name} is stored as {weight.dtype} without a scale beside it", hint=ORIGINAL)
    if not scales:
        return weight
    block = _block(name, weight, scales[0], form)
    zero_point = beside.get(ZERO_POINT)
    if zero_point is not None and zero_point.shape != scales[0].shape:
        raise UsageError(
            f"{name} has scales {list(scales[0].shape)} and zero points {list(zero_point.shape)}, expected one shape",
            hint=ORIGINAL,
        )
    return StoredTensor(weight.file, weight.key, weight.dtype, weight.shape, scales[0], zero_point, block)


def packed_weight(
    name: str, words: StoredTensor, beside: dict[str, StoredTensor], form: StoredFormat | None
) -> StoredTensor:
    """Return a weight whose codes are packed into words, with what dequantizes it.

    Args:
        name: of the weight, for messages.
        words: the packed codes.
        beside: :data:`SCALES`, :data:`ZERO_POINT` and :data:`SHAPE` as far as the checkpoint has them.
        form: what the configuration says; None if it says nothing.

    Raises:
        UsageError: the meaning of the stored numbers is not certain.
    """
    if form is None or form.packed is None:
        raise UsageError(
            f"{name} is stored as {words.key}, and config.json does not say how to unpack it", hint=ORIGINAL
        )
    bits, shifted = form.packed
    missing = [part for part in (SCALES[0], SHAPE) if part not in beside]
    if missing or (ZERO_POINT in beside) is not shifted:
        odd = missing[0] if missing else ZERO_POINT
        state = "beside it, which its symmetric codes do not have" if odd in beside else "missing"
        raise UsageError(f"{name} is stored as {words.key}, with {odd} {state}", hint=ORIGINAL)
    shape, scale = tuple(beside[SHAPE].read().flatten().tolist()), beside[SCALES[0]]
    if len(shape) != 2 or min(shape) < 1:
        raise UsageError(f"{name} is {list(shape)} by {beside[SHAPE].key}, expected a matrix", hint=ORIGINAL)
    packing = Packing(bits, 1, shape[1])
    _require_words(name, words, (shape[0], packing.words))
    weight = StoredTensor(words.file, words.key, f"I{bits}", shape, packing=packing)
    zero_point = None
    if shifted:
        rows = Packing(bits, 0, shape[0])
        _require_words(name, beside[ZERO_POINT], (rows.words, *scale.shape[1:]))
        zero_point = replace(beside[ZERO_POINT], dtype=f"I{bits}", shape=scale.shape, packing=rows)
    return replace(weight, scale=scale, zero_point=zero_point, block=_block(name, weight, scale, form))


def _require_words(name: str, words: StoredTensor, shape: tuple[int, ...]) -> None:
    if (words.dtype, words.shape) != ("I32", shape):
        raise UsageError(
            f"{name}: {words.key} is {words.dtype} {list(words.shape)}, expected I32 {list(shape)}", hint=ORIGINAL
        )


def _block(name: str, weight: StoredTensor, scale: StoredTensor, form: StoredFormat | None) -> tuple[int, int]:
    """Return how many rows and columns of a weight share a scale; raises UsageError if that is not certain."""
    stated = form.block if form else None
    kind = f"{stated[0]} by {stated[1]}" if stated else f"{USUAL_BLOCK} by {USUAL_BLOCK}, or per group of a row"
    wrong = UsageError(
        f"{name} is {list(weight.shape)} and its scales {list(scale.shape)} in {scale.dtype}: expected one, one per "
        f"row, or one per block of {kind}",
        hint=ORIGINAL,
    )
    shape = (*scale.shape, 1, 1)[:2]
    if len(weight.shape) != 2 or len(scale.shape) > 2 or scale.dtype not in (*FLOATS, "F8_E8M0"):
        raise wrong
    if shape == (1, 1) or shape == (weight.shape[0], 1):
        return weight.shape[0] // shape[0], weight.shape[1]
    if stated:
        if shape != tuple(-(-size // step) for size, step in zip(weight.shape, stated, strict=True)):
            raise wrong
        return stated
    if all(count == -(-size // USUAL_BLOCK) for count, size in zip(shape, weight.shape, strict=True)):
        return USUAL_BLOCK, USUAL_BLOCK
    if shape[0] == weight.shape[0] and weight.shape[1] % shape[1] == 0:
        return 1, weight.shape[1] // shape[1]
    raise wrong
