"""An INT8 embedding in fake-quant: rows of codes, read by a tied head, and the original afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Teacher

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def weight(model: TorchRunner, path: str) -> np.ndarray:
    found: np.ndarray = model.module.get_submodule(path).weight.detach().numpy()
    return found


def rounded(table: np.ndarray, block: int) -> np.ndarray:
    """Return a table as INT8 codes with one scale per ``block`` values of a row."""
    blocks = table.reshape(len(table), -1, block)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    return (np.rint(blocks / scales) * scales).astype(np.float32).reshape(table.shape)


@pytest.mark.parametrize("quantize_head", [False, True])
def test_rows_become_dequantized_codes_and_come_back(tiny_model: TorchRunner, quantize_head: bool) -> None:
    before, head = weight(tiny_model, EMBEDDING).copy(), weight(tiny_model, HEAD).copy()
    scheme = QuantScheme(quantize_head=quantize_head, int8_embedding=True)
    with simulated(tiny_model, scheme, None):
        np.testing.assert_array_equal(weight(tiny_model, EMBEDDING), rounded(before, 32))
        if quantize_head:
            np.testing.assert_array_equal(weight(tiny_model, HEAD), rounded(head, head.shape[1]))
        elif tiny_model.spec.tied_head:
            np.testing.assert_array_equal(weight(tiny_model, HEAD), rounded(head, 32))
        else:
            np.testing.assert_array_equal(weight(tiny_model, HEAD), head)
    np.testing.assert_array_equal(weight(tiny_model, EMBEDDING), before)
    np.testing.assert_array_equal(weight(tiny_model, HEAD), head)


def test_a_teacher_keeps_the_original_head_and_memory_does_not_grow(tiny_model: TorchRunner) -> None:
    teacher = Teacher(tiny_model)
    before = teacher.head.detach().numpy().copy()
    embedding = tiny_model.module.get_submodule(EMBEDDING).weight
    with simulated(tiny_model, QuantScheme(quantize_head=False, int8_embedding=True), None):
        np.testing.assert_array_equal(teacher.head.detach().numpy(), before)
    assert tiny_model.module.get_submodule(EMBEDDING).weight is embedding
    if tiny_model.spec.tied_head:
        assert tiny_model.module.get_submodule(HEAD).weight is embedding
