"""The limits of the parity checks, with the measurements behind them.

They are constants, or multiples of what the model alone decides: a check that can be tuned until it passes proves
nothing.
"""

from __future__ import annotations

NOISE = 16
"""Largest difference of float32 logits of two faithful graphs, in units of the rounding noise of the model.

Both sides round by about as much as the noise, which is the largest of a sample. Measured with 64 tokens as the sample
and 256 as the text: 0.7 to 1.0 in SmolLM2.
"""
IDENTICAL_CODES = 0.999
CODE_DIFFERENCE = 1
PERPLEXITY = 0.005
"""Relative difference of perplexity between engine and fake-quant, on top of two standard errors of the difference."""
# float16 has 11 bits of precision: one rounding moves a code q by up to |q| / 2048, and the code flips with a
# probability equal to the mean distance moved: 1 % for |q| of 20. In attention, rounding a score s changes its weight
# by |s| / 2048 of it, so more than one code is possible. Measured at the lowest Site: 97.8 % identical in SmolLM2,
# largest difference 1; in tiny random models 96.6 % and 2. With a scale that is 5 % wrong, half of the codes are
# identical.
#
# bfloat16 has 8 bits: all differences are 8 times as large, and so are the limits. Measured: 83.6 % identical at
# the lowest Site of SmolLM2, largest difference 5, logits 1.5 %; in Gemma 3 270M, whose residual stream reaches 98,858,
# 86.7 %, 6 and 2.4 %.
#
# Logits: a quantized head rounds once, 2^-11; a head in floating point reads a residual stream that every layer rounds
# (0.2 % measured in SmolLM2, which has 60 such additions).
PLAN_LIMITS = {
    "float32": (IDENTICAL_CODES, CODE_DIFFERENCE, 2**-16),
    "float16": (0.95, 2, 2**-8),
    "bfloat16": (0.6, 16, 2**-5),
}
"""By type: smallest share of identical codes, largest code difference, largest logit difference / largest logit."""
TIED_HEAD_LOGITS = 2**-12
"""Largest logit difference / largest logit of the kernels of ONNX Runtime, where a tied head reads INT8 codes.

Its kernel gets the head's input in two parts and rounds the smaller one to 8 bits. A value is off by at most 1 / 254^2
of the largest of its block. Measured: 2^-14.4 in Gemma 3 270M, of 50 million logits.
"""
