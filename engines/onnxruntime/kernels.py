"""Which integer kernels of ONNX Runtime are exact on this processor: tried, not looked up.

The linears of a bundle multiply uint8 activations by int8 weights. x86 without VNNI adds pairs of such products in 16
bits that saturate, without any message. ``session.x64quantprecision`` stores the weights as uint8 with zero point 128
instead: the same codes and exact sums, in kernels that are half as fast where VNNI or AMX would have been exact anyway.
A bundle moves from machine to machine, so the first session of a process multiplies one linear of extreme codes in each
way, and the sessions take the first way that agrees with integer arithmetic, which is the faster one.

A tied head on the codes of an INT8 embedding has a kernel of its own, MatMulNBits. By default it multiplies uint8
weights by int8 activations, and is tried in the same way; where it is not exact, the sessions take the slow one with
float32 activations (``session.qdq_matmulnbits_accuracy_level``).

The verdict is kept for the process and no longer: finding it takes a few milliseconds, and a file could outlive the
machine it is true for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.schemes import EMBEDDING_BLOCK
from cushion_deploy.engines.extreme_codes import extreme_products, extreme_weights, is_exact
from cushion_deploy.engines.one_linear import one_head, one_linear
from cushion_deploy.errors import CheckFailed

SESSION_CONFIG = {
    # Softmax over masked positions produces subnormals, which made one call up to 30 times slower.
    "session.set_denormal_as_zero": "1",
}
"""Config entries of every session on every machine. Those of the test here have them too: ONNX Runtime applies
flush-to-zero to the calling thread only through the first session of a process."""
UINT8_WEIGHTS = "session.x64quantprecision"
WAYS = {"0": "uint8 activations x int8 weights", "1": "uint8 activations x uint8 weights"}
"""Values of that setting with what they multiply, the faster one first."""


HEAD_ACTIVATIONS = "session.qdq_matmulnbits_accuracy_level"
INT8_HEAD, FLOAT_HEAD = "4", "1"
"""Values of that setting: activations of 8 bits, and the slow kernel that has float32 ones."""


@lru_cache(maxsize=1)
def exact_kernels() -> Mapping[str, str]:
    """Return the config entries with which integer sums are exact on this processor.

    Raises:
        CheckFailed: no setting makes them exact.
    """
    for value in WAYS:
        if adds_exactly(value):
            return {UINT8_WEIGHTS: value, HEAD_ACTIVATIONS: INT8_HEAD if head_adds_exactly(value) else FLOAT_HEAD}
    raise CheckFailed(
        "ONNX Runtime adds products of INT8 codes wrongly on this processor, whatever the setting",
        hint="use the pinned version of onnxruntime, and report this with the name of the processor",
    )


def kernels_in_words() -> str:
    """State what the sessions of this process multiply, and why."""
    value = exact_kernels()[UINT8_WEIGHTS]
    others = "" if value == "0" else f", in which {WAYS['0']} was not"
    return f"{WAYS[value]}, exact in a test of extreme codes{others}"


def adds_exactly(value: str) -> bool:
    """Return whether a linear has the sums of integer arithmetic with a value of :data:`UINT8_WEIGHTS`."""
    weights = extreme_weights()
    products = _products(weights, one_linear(weights), {UINT8_WEIGHTS: value})
    return all(is_exact(codes, weights, found) for codes, found in products)


def head_adds_exactly(value: str) -> bool:
    """Return whether a head that reads codes by block has the sums of integer arithmetic with 8-bit activations.

    Args:
        value: of :data:`UINT8_WEIGHTS` in the sessions that run the head: it may convert the codes of a head, too.
    """
    weights = extreme_weights()
    config = {UINT8_WEIGHTS: value, HEAD_ACTIVATIONS: INT8_HEAD}
    products = _products(weights, one_head(weights, EMBEDDING_BLOCK), config)
    return all(is_exact(codes, weights, found) for codes, found in products)


def _products(weights: Any, model: bytes, config: Mapping[str, str]) -> Iterator[tuple[Any, FloatArray]]:
    """Yield codes int8 ``[rows, in]``, and what ONNX Runtime computes of them with a model of ``weights``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, entry in {**SESSION_CONFIG, **config}.items():
        options.add_session_config_entry(key, entry)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    yield from extreme_products(lambda codes: session.run(None, {"x": codes})[0])
