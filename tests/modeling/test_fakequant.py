"""The torch rule gives the codes of the numpy rule, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cushion_deploy.core.fakequant import dequantize, quantize_weight, spread
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.fakequant import fake_quantize_weight, weight_codes

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(weight=WEIGHTS, bits=st.sampled_from((8, 6, 4)), group=st.sampled_from((0, 1, 2, 3, 8)))
def test_codes_and_scales_are_those_of_the_numpy_rule(weight: npt.NDArray[np.float32], bits: int, group: int) -> None:
    codes, scale = quantize_weight(weight, "w", bits, group)
    found, steps = weight_codes(torch.from_numpy(weight.copy()), "w", bits, group)
    np.testing.assert_array_equal(found.numpy(), codes)
    np.testing.assert_array_equal(steps.numpy().reshape(scale.shape), scale)
    values = fake_quantize_weight(torch.from_numpy(weight.copy()), "w", bits, group)
    np.testing.assert_array_equal(values.numpy(), dequantize(codes, spread(scale, weight.shape[1], group)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused_by_name(wrong: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = wrong
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down\[0\] contains NaN or infinity"):
        weight_codes(weight, "layers.0.mlp.down[0]")
