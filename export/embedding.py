"""The token embedding: rows of the table for token ids, and scores of a tied head, which reads the same table.

In INT8 the table has one scale per block of a row, as in GGUF's Q8_0: codes of such a file are stored unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array, dequantize, qmax, quantize_weight, spread, weight_scale
from cushion_deploy.core.schemes import EMBEDDING_BLOCK
from cushion_deploy.core.weights import WeightSource, blocks
from cushion_deploy.export.builder import GraphBuilder

_SMALLEST = 1e-30
"""Stands in for the largest value of a block of zeros, by which nothing can be divided."""


@dataclass(frozen=True)
class Embedding:
    """The table of a graph's token embedding.

    Attributes:
        g: the graph.
        weights: the model's tensors.
        name: tensor of the table, ``[vocab, hidden]``.
        int8: whether its values are those of INT8 codes with one scale per ``EMBEDDING_BLOCK`` values of a row.
        holds_codes: whether these codes are stored; if not, the table is stored in the graph's type. TensorRT accepts
            INT8 constants before a DQ with one scale per channel only.
    """

    g: GraphBuilder
    weights: WeightSource
    name: str
    int8: bool
    holds_codes: bool

    def rows(self, ids: ir.Value) -> ir.Value:
        """Return the rows of token ids ``[B, S]``: ``[B, S, hidden]`` of the graph's type."""
        g = self.g
        if not self.holds_codes:
            return g.op("Gather", self._table, ids, axis=0)
        codes = g.op("Cast", g.op("Gather", self._codes, ids, axis=0), to=int(ir.DataType.FLOAT))
        scales = self._float32(g.op("Gather", self._scales, ids, axis=0))
        values = g.op("Mul", self._in_blocks(codes), g.op("Unsqueeze", scales, g.ints(-1)))
        return self._joined(values)

    def scores(self, x: ir.Value, *, may_be_empty: bool) -> ir.Value:
        """Return the products of ``x`` ``[B, S, hidden]`` with all rows, ``[B, S, vocab]``, of the graph's type.

        The codes go through Transpose and DQ. ONNX Runtime folds the Transpose and fuses the rest into MatMulNBits,
        which rounds ``x`` to 8 bits with one scale per block. So ``x`` is given in two parts that this leaves alone:
        the rounded value, and what rounding takes away.

        Args:
            x: hidden states of the graph's type.
            may_be_empty: whether S can be 0.
        """
        g = self.g
        if self.holds_codes:
            codes = g.op("Transpose", self._codes, perm=[1, 0])
            scales = g.op("Transpose", self._float32(self._scales), perm=[1, 0])
            # Written out, because ONNX Runtime's conversion to uint8 weights fails without one; and as large as the
            # scales, so not stored.
            size = g.ints(self._shape[1] // EMBEDDING_BLOCK, self._shape[0])
            zeros = g.op("ConstantOfShape", size, value=ir.tensor(np.zeros(1, np.int8)))
            weight = g.op(
                "DequantizeLinear", codes, scales, zeros, name="weight_DQ", axis=0, block_size=EMBEDDING_BLOCK
            )
            products = g.op("MatMul", self._in_two_parts(x), weight, name="MatMul")
            return g.op("ReduceSum", products, g.ints(0), keepdims=0)
        rows = g.op("Reshape", x, g.ints(-1, self._shape[1]))
        found = g.op("Gemm", rows, self._table, transB=1)
        shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.ints(self._shape[0]), axis=0)
        return g.op("Reshape", found, shape, allowzero=int(may_be_empty))

    def _in_two_parts(self, x: ir.Value) -> ir.Value:
        """Return ``[2, B, S, hidden]``, whose sum over the first axis is ``x``: codes times scales, and the rest."""
        g = self.g
        parts = self._in_blocks(x)
        largest = g.op("ReduceMax", g.op("Abs", parts), g.ints(-1), keepdims=1)
        step = g.op("Div", g.op("Max", largest, g.scalar(_SMALLEST)), g.scalar(qmax(8)))
        rounded = self._joined(g.op("Mul", g.op("Round", g.op("Div", parts, step)), step))
        rest = g.op("Sub", x, rounded)
        return g.op("Concat", *(g.op("Unsqueeze", part, g.ints(0)) for part in (rounded, rest)), axis=0)

    def _in_blocks(self, x: ir.Value) -> ir.Value:
        """Return ``[B, S, hidden]`` as ``[B, S, blocks, block]``."""
        return self.g.op("Reshape", x, self.g.ints(0, 0, self._shape[1] // EMBEDDING_BLOCK, EMBEDDING_BLOCK))

    def _joined(self, x: ir.Value) -> ir.Value:
        """Return ``[B, S, blocks, block]`` as ``[B, S, hidden]``."""
        return self.g.op("Reshape", x, self.g.ints(0, 0, self._shape[1]))

    def _float32(self, scales: ir.Value) -> ir.Value:
        return self.g.cast(scales, self._scale_dtype, ir.DataType.FLOAT)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    @cached_property
    def _table(self) -> ir.Value:
        """The table ``[vocab, hidden]`` in the graph's type."""
        return self.g.lazy(self.name, self.g.dtype, self._shape, self._float_table)

    @cached_property
    def _codes(self) -> ir.Value:
        return self.g.lazy(f"{self.name}_codes", ir.DataType.INT8, self._shape, self._quantized)

    @cached_property
    def _scale_array(self) -> FloatArray:
        found = [weight_scale(block, self.name, group=EMBEDDING_BLOCK) for _, block in blocks(self.weights, self.name)]
        return np.concatenate(found)

    @cached_property
    def _scale_dtype(self) -> ir.DataType:
        """float16 if it represents every scale exactly, as those of a Q8_0 file; otherwise float32."""
        scales = self._scale_array
        with np.errstate(over="ignore"):
            exact = np.array_equal(scales.astype(np.float16), scales)
        return ir.DataType.FLOAT16 if exact else ir.DataType.FLOAT

    @cached_property
    def _scales(self) -> ir.Value:
        """The scales ``[vocab, blocks]``."""
        return self.g.constant(self._scale_array.astype(self._scale_dtype.numpy()), f"{self.name}_scales")

    def _float_table(self) -> npt.NDArray[Any]:
        array = np.empty(self._shape, self.g.dtype.numpy())
        for rows, block in blocks(self.weights, self.name):
            array[rows] = self._rounded(block) if self.int8 else block
        return array

    def _rounded(self, block: FloatArray) -> FloatArray:
        codes, scales = quantize_weight(block, self.name, group=EMBEDDING_BLOCK)
        return dequantize(codes, spread(scales, block.shape[1], EMBEDDING_BLOCK))

    def _quantized(self) -> Int8Array:
        codes = np.empty(self._shape, np.int8)
        for rows, block in blocks(self.weights, self.name):
            codes[rows] = quantize_weight(block, self.name, group=EMBEDDING_BLOCK)[0]
        return codes
