"""How a configuration says that weights are already quantized: what can be dequantized, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cushion_deploy.errors import UsageError

ORIGINAL = (
    "give the floating-point checkpoint that it was made from, whose name is usually on its model card. Weights in FP8 "
    "or INT8 with scales are dequantized (fp8, fbgemm_fp8, modelopt FP8, compressed-tensors), and so is packed INT4 or "
    "INT8 of compressed-tensors"
)
_COMPRESSED = ("dense", "float-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors whose weights are one FP8 or INT8 number per element, with scales beside them."""
_PACKED = "pack-quantized"
"""Format of compressed-tensors with several codes in a word of 32 bits."""
_BITS = (4, 8)
"""Sizes of a code that divide a word: of others, versions of compressed-tensors leave different bits unused."""
_ORDERS = (None, "weight", "static")
"""Orders of columns in which groups follow each other as they are stored."""
_STAGED = ("initialized", "calibration", "frozen")
"""States of compressed-tensors in which the weights in the file are still in floating point."""
_SCALED_BY = {"tensor": None, "channel": None, "token": None}


@dataclass(frozen=True)
class StoredFormat:
    """How quantized weights are stored, as far as the configuration says so.

    Attributes:
        method: the name in the configuration, for messages.
        block: elements of a weight ``[out, in]`` that share a scale; None if the shape of the scales says it.
        floats: whether weights with scales beside them may be in floating point.
        packed: bits of a packed code, and whether zero points belong to it; None if nothing is packed.
    """

    method: str
    block: tuple[int, int] | None = None
    floats: bool = False
    packed: tuple[int, bool] | None = None


def stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return how the weights of a config.json are quantized; None if it says nothing about it.

    Raises:
        UsageError: in a way that is not read, or whose meaning is not certain.
    """
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise UsageError(f"config.json has {key} = {found!r}, expected an object", hint=ORIGINAL)
        return _format_of(found, key)
    return None


def _format_of(found: Mapping[str, Any], key: str) -> StoredFormat:
    method = str(found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else "an unknown way"))
    if method == "fp8":
        _require(found.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"), method, f"fmt {found.get('fmt')!r}", key)
        _require(found.get("expert_dtype", "fp8") == "fp8", method, f"experts in {found.get('expert_dtype')!r}", key)
        return StoredFormat(method, _block(found.get("weight_block_size"), method, key))
    if method == "fbgemm_fp8":
        return StoredFormat(method)
    if method == "modelopt":
        algorithm = found.get("quant_algo")
        _require(algorithm == "FP8", method, f"quant_algo {algorithm!r}", key)
        return StoredFormat("modelopt FP8")
    if method == "compressed-tensors":
        return _compressed_tensors(found, key)
    raise UsageError(
        f"the checkpoint is quantized with {method} (config.json has {key}), which is not read", hint=ORIGINAL
    )


def _compressed_tensors(found: Mapping[str, Any], key: str) -> StoredFormat:
    method = "compressed-tensors"
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    _require(sparsity == "dense", method, f"sparsity format {sparsity!r}", key)
    _require(not found.get("transform_config"), method, "a transform_config, which rotates activations", key)
    groups = list((found.get("config_groups") or {}).values())
    formats = {found.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}
    for name in sorted(formats):
        _require(name in (*_COMPRESSED, _PACKED), method, f"the format {name!r}", key)
    blocks, packings = set(), set()
    for group in groups:
        weights = group.get("weights")
        if not weights:
            continue
        bits, strategy = weights.get("num_bits", 8), weights.get("strategy")
        if (group.get("format") or found.get("format")) == _PACKED:
            packings.add(_packing(weights, method, key))
        else:
            _require(bits == 8, method, f"{bits}-bit weights", key)
        if strategy == "block":
            blocks.add(_block(weights.get("block_structure"), method, key))
        elif strategy == "group":
            blocks.add(_block([1, weights.get("group_size")], method, key))
        else:
            _require(strategy is None or strategy in _SCALED_BY, method, f"scales per {strategy!r}", key)
            blocks.add(None)
    _require(len(blocks) < 2, method, "groups with scales of several kinds", key)
    _require(len(packings) < 2, method, "groups that are packed in several ways", key)
    staged = found.get("quantization_status") in _STAGED or formats == {"dense"}
    named = f"{method}, {', '.join(sorted(formats)) or 'no format'}"
    return StoredFormat(named, next(iter(blocks), None), staged, next(iter(packings), None))


def _packing(weights: Mapping[str, Any], method: str, key: str) -> tuple[int, bool]:
    """Return the bits of packed weights, and whether zero points belong to them."""
    bits: Any = weights.get("num_bits")
    strategy, symmetric = weights.get("strategy"), weights.get("symmetric")
    _require(bits in _BITS and weights.get("type", "int") == "int", method, f"packed weights of {bits} bits", key)
    _require(strategy in ("channel", "group"), method, f"packed weights with scales per {strategy!r}", key)
    _require(symmetric in (True, False, None), method, f"symmetric {symmetric!r}", key)
    _require(weights.get("actorder") in _ORDERS, method, f"columns ordered by {weights.get('actorder')!r}", key)
    return int(bits or 0), symmetric is False


def _block(size: Any, method: str, key: str) -> tuple[int, int] | None:
    if size is None:
        return None
    whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    _require(whole, method, f"blocks of {size!r}", key)
    return int(size[0]), int(size[1])


def _require(covered: bool, method: str, what: str, key: str) -> None:
    if not covered:
        raise UsageError(
            f"the checkpoint is quantized with {method} and {what} (config.json has {key}), which is not read",
            hint=ORIGINAL,
        )
