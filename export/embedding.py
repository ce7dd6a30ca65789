"""The token embedding: rows of the table for token ids, and scores of a tied head, which reads the same table.

In INT8 a row has its codes and one scale, which is also how a linear is quantized whose output channels are the rows:
one tensor of codes serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array, quantize_weight, weight_scale
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.core.weights import WeightSource, blocks
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import StoredCodes


@dataclass(frozen=True)
class Embedding:
    """The table of a graph's token embedding.

    Attributes:
        g: the graph.
        weights: the model's tensors.
        name: tensor of the table, ``[vocab, hidden]``.
        int8: whether the table is stored as INT8 codes with one float32 scale per row, or in the graph's type.
        gathers_codes: whether rows of an INT8 table are gathered as codes. TensorRT accepts INT8 constants before a DQ
            only, so graphs for plans gather from the dequantized table. ONNX Runtime would dequantize it in every
            step, which takes 30 ms for SmolLM2.
    """

    g: GraphBuilder
    weights: WeightSource
    name: str
    int8: bool
    gathers_codes: bool

    def rows(self, ids: ir.Value) -> ir.Value:
        """Return the rows of token ids ``[B, S]``: ``[B, S, hidden]`` of the graph's type."""
        g = self.g
        if not self.gathers_codes:
            return g.op("Gather", self._table, ids, axis=0)
        codes = g.op("Cast", g.op("Gather", self._codes, ids, axis=0), to=int(ir.DataType.FLOAT))
        # Reshaped before the Gather: ONNX Runtime fuses the product of a tied head only if nothing but its DQ reads the
        # scales, and folds a Reshape of a constant.
        column = g.op("Reshape", self._scales, g.ints(-1, 1))
        return g.from_float32(g.op("Mul", codes, g.op("Gather", column, ids, axis=0)))

    def scores(self, x: ir.Value, *, may_be_empty: bool) -> ir.Value:
        """Return the products of ``x`` ``[B, S, hidden]`` with all rows, ``[B, S, vocab]``, of the graph's type.

        The table in INT8 goes through Transpose and DQ. ONNX Runtime folds the Transpose and fuses the rest into
        MatMulNBits, which reads 8-bit weights and, like its other integer kernels, 8-bit activations: by blocks of 32,
        with a scale of their own that is computed on the way.

        Args:
            x: hidden states of the graph's type.
            may_be_empty: whether S can be 0.
        """
        g = self.g
        if self.gathers_codes:
            codes, scales = self.transposed_codes()
            weight = g.op("DequantizeLinear", codes, scales, name="weight_DQ", axis=1)
            return g.op("MatMul", x, g.from_float32(weight), name="MatMul")
        rows = g.op("Reshape", x, g.ints(-1, self.weights.shape(self.name)[1]))
        found = g.op("Gemm", rows, self._table, transB=1)
        vocabulary = g.ints(self.weights.shape(self.name)[0])
        shape = g.op("Concat", g.op("Shape", x, start=0, end=2), vocabulary, axis=0)
        return g.op("Reshape", found, shape, allowzero=int(may_be_empty))

    def transposed_codes(self) -> StoredCodes:
        """Return the codes as the weight of a linear, int8 ``[hidden, vocab]``, and their scales ``[vocab]``."""
        codes = self.g.op("Transpose", self._codes, perm=[1, 0], name="transposed_codes")
        # Engines fold the Transpose, and what they run in INT8 is counted by the names of weights.
        codes.name = f"{HEAD_SITE}.weight_codes"
        return codes, self._scales

    @cached_property
    def _table(self) -> ir.Value:
        """The table ``[vocab, hidden]`` in the graph's type."""
        if self.int8:
            rows = self.g.op("DequantizeLinear", self._codes, self._scales, name="table_DQ", axis=0)
            return self.g.from_float32(rows)
        return self.g.lazy(self.name, self.g.dtype, self.weights.shape(self.name), self._float_table)

    @cached_property
    def _codes(self) -> ir.Value:
        return self.g.lazy(f"{self.name}_codes", ir.DataType.INT8, self.weights.shape(self.name), self._quantized)

    @cached_property
    def _scales(self) -> ir.Value:
        """The scales, float32 in every graph: that of a small row can be below the normal range of float16."""
        found = [weight_scale(block, self.name) for _, block in blocks(self.weights, self.name)]
        scales: FloatArray = np.concatenate(found)
        return self.g.constant(scales, f"{self.name}_scales")

    def _float_table(self) -> npt.NDArray[Any]:
        array = np.empty(self.weights.shape(self.name), self.g.dtype.numpy())
        for rows, block in blocks(self.weights, self.name):
            array[rows] = block
        return array

    def _quantized(self) -> Int8Array:
        codes = np.empty(self.weights.shape(self.name), np.int8)
        for rows, block in blocks(self.weights, self.name):
            codes[rows] = quantize_weight(block, self.name)[0]
        return codes
