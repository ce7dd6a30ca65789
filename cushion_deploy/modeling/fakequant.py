"""The rounding rule of the project in torch: the codes of ``core/fakequant.py``, bit for bit, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion_deploy.core.fakequant import levels, qmax
from cushion_deploy.errors import UsageError

TINY = torch.finfo(torch.float32).tiny


def quantize_codes(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Return the integer codes of ``x`` as float32; ``scale`` broadcasts.

    It divides by the scale, as ONNX QuantizeLinear does, instead of multiplying by the reciprocal.
    """
    limit = qmax(bits)
    return (x.float() / scale).round_().clamp_(-limit - 1, limit)


def quantize_asymmetric_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Return the codes of ``x``, 0 to 2^bits - 1, as float32; scale and zero point broadcast."""
    return (x.float() / scale).round_().add_(zero_point).clamp_(0, levels(bits))


def weight_codes(weight: Tensor, name: str, bits: int = 8, group: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize the weight of a linear symmetrically, per output channel or per group of input features in a channel.

    Args:
        weight: float32 ``[out_features, in_features]``.
        name: tensor name, for the error.
        bits: width of the codes.
        group: input features that share a scale; the last group of a channel may be smaller. 0 for all.

    Returns:
        Codes as float32 ``[out_features, in_features]`` and scales float32 ``[out_features, groups]``. A channel or
        group of zeros gets scale 1, as in the numpy rule.

    Raises:
        UsageError: the weight contains NaN or infinity.
    """
    parts = torch.split(weight, group or weight.shape[1], dim=1)
    # Two passes without a copy, because weights are large.
    amax = torch.stack([torch.maximum(part.amax(dim=1), -part.amin(dim=1)) for part in parts], dim=1)
    if not bool(torch.isfinite(amax).all()):
        raise UsageError(
            f"weight {name} contains NaN or infinity", hint="the checkpoint is damaged; fetch the model again"
        )
    # The divisor is a tensor: a Python number may be applied in double precision or as its reciprocal.
    scale = amax / amax.new_tensor(float(qmax(bits)))
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    return quantize_codes(weight, _spread(scale, weight, group), bits), scale


def fake_quantize_weight(weight: Tensor, name: str, bits: int = 8, group: int = 0) -> Tensor:
    """Return a weight, float32 ``[out_features, in_features]``, as its dequantized codes; see :func:`weight_codes`."""
    codes, scale = weight_codes(weight, name, bits, group)
    return codes.mul_(_spread(scale, weight, group))


def _spread(scale: Tensor, weight: Tensor, group: int) -> Tensor:
    """Return scales ``[out_features, groups]`` in a shape that broadcasts against the weight."""
    return scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]] if group else scale
