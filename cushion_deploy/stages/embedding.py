"""Find out whether INT8 codes represent a model's token embedding exactly, so that storing them loses nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cushion_deploy.core.fakequant import dequantize, quantize_weight, spread
from cushion_deploy.core.schemes import EMBEDDING_BLOCK
from cushion_deploy.core.weights import WeightSource, blocks
from cushion_deploy.stages.base import Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

VERDICT = "exact.json"
EXACT_SECONDS = 1e-8
"""Seconds per parameter."""


@dataclass(frozen=True)
class ExactEmbedding(Stage[bool]):
    """Compare the token embedding with its INT8 codes and scales.

    They are equal where the file of the model holds such codes: in a GGUF file whose token embedding is Q8_0, which is
    what most of them have.

    Attributes:
        model: its weights are read from disk.
    """

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 1
    runs_model: ClassVar[bool] = False
    model: Node[TorchRunner]

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the verdict."""
        model = inputs.get(self.model)
        write_json(out / VERDICT, is_exact(model.weights, f"{model.family.embedding}.weight"))

    def read(self, folder: Path) -> bool:
        """Return whether the codes are exact."""
        return bool(read_json(folder / VERDICT))

    def seconds(self, speed: Speed) -> float:
        """Count the parameters of the table, at most all."""
        return EXACT_SECONDS * speed.spec.parameters


def is_exact(weights: WeightSource, name: str) -> bool:
    """Return whether every value of a table ``[vocab, hidden]`` is its INT8 code times the scale of its block."""
    if weights.shape(name)[1] % EMBEDDING_BLOCK:
        return False
    for _, block in blocks(weights, name):
        codes, scales = quantize_weight(block, name, group=EMBEDDING_BLOCK)
        if not np.array_equal(dequantize(codes, spread(scales, block.shape[1], EMBEDDING_BLOCK)), block):
            return False
    return True
