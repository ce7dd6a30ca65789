"""Blocks of a tensor are the tensor, whatever its size, its layout on disk and what is folded into it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cushion_deploy.core import weights as module
from cushion_deploy.core.sites import Site
from cushion_deploy.core.weights import blocks, whole
from cushion_deploy.export.linear import PackedLinear
from cushion_deploy.families import get_family
from cushion_deploy.modeling.checkpoint import Checkpoint

NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("block_bytes", [1, 64, 200, 2**20])
@pytest.mark.parametrize(("family", "name"), [("llama", "model.norm.weight"), ("gpt2", NAME), ("llama", NAME)])
def test_blocks_are_the_rows_of_the_tensor_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, family: str, name: str
) -> None:
    tensor = torch.arange(77, dtype=torch.float32).reshape(7, 11)
    save_file({name: tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    found = Checkpoint(tmp_path, get_family(family))
    stored = next(iter(found.names()))
    expected = tensor.numpy().T if family == "gpt2" else tensor.numpy()  # gpt2 keeps its linears as [in, out]
    assert found.shape(stored) == expected.shape
    pieces = list(blocks(found, stored))
    np.testing.assert_array_equal(np.concatenate([block for _, block in pieces]), expected)
    assert [i for rows, _ in pieces for i in range(rows.start, rows.stop)] == list(range(len(expected)))
    assert all(block.nbytes <= max(block_bytes, 4 * expected.shape[1]) for _, block in pieces)
    np.testing.assert_array_equal(whole(found, stored), expected)


def test_a_linear_is_quantized_within_its_codes_and_a_few_blocks(tmp_path: Path) -> None:
    shape = (4096, 4096)
    save_file({"model.w.weight": torch.ones(shape, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    linear = PackedLinear(Site("head"), ("model.w",), Checkpoint(tmp_path, get_family("llama")))
    tracemalloc.start()
    codes = linear.codes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert codes.nbytes == 2**24
    # float32 of the whole would be 64 MiB alone; a block is quantized in four copies of itself at most.
    assert peak < codes.nbytes + 5 * module.BLOCK_BYTES
    assert (codes == 127).all()
