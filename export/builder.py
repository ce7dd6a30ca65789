"""A thin layer over onnx_ir: appends nodes, shares constants, keeps readable names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.dtypes import Dtype

IR_VERSION = 8
"""IR version of ONNX 1.13: old enough for the parser of TensorRT 10.3, new enough for opset 17."""
DTYPES: dict[Dtype, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
"""ONNX types of the floating-point types of a graph."""


class GraphBuilder:
    """Collects the nodes and initializers of one graph, in order.

    Attributes:
        opset: opset of the default domain.
        dtype: floating-point type of activations.
        inputs, outputs: of the graph, in order.
    """

    def __init__(self, opset: int, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        """Start an empty graph."""
        self.opset = opset
        self.dtype = dtype
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scope = ""

    def scope(self, name: str) -> None:
        """Set the prefix of the names of the nodes that follow, e.g. ``layers.3.attn``."""
        self._scope = name

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; string dimensions are symbolic."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self.inputs.append(value)
        return value

    def optional_input(self, name: str, default: npt.NDArray[Any]) -> ir.Value:
        """Declare an input with a default value: an initializer that is listed as a graph input too."""
        value = self.constant(default, name)
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a value as a graph output under ``name``."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(list(shape))
        self.outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value, name: str | None = None, **attributes: Any) -> ir.Value:
        """Append a node with one output and return it."""
        return self.ops(op_type, 1, *inputs, name=name, **attributes)[0]

    def ops(
        self, op_type: str, num_outputs: int, *inputs: ir.Value, name: str | None = None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs and return them."""
        full = f"{self._scope}/{name or op_type}_{len(self._nodes)}"
        node = ir.node(op_type, list(inputs), attributes, num_outputs=num_outputs, name=full)
        for i, value in enumerate(node.outputs):
            value.name = full if num_outputs == 1 else f"{full}:{i}"
        self._nodes.append(node)
        return node.outputs

    def constant(self, array: npt.NDArray[Any], name: str | None = None) -> ir.Value:
        """Return an initializer; equal constants without a name are stored once.

        Raises:
            ValueError: the name is taken by an initializer of another type, shape or value.
        """
        key = name or f"const/{array.dtype}/{list(array.shape)}/{array.tobytes().hex()}"
        found = self._initializers.get(key)
        if found is None:
            label = name or f"const_{len(self._initializers)}"
            return self._store(key, ir.Tensor(array, name=label))
        tensor = found.const_value
        if not isinstance(tensor, ir.Tensor) or not _equal(tensor.numpy(), array):
            raise ValueError(f"constant '{name}' is in the graph already, with another value")
        return found

    def ints(self, *values: int) -> ir.Value:
        """Return a 1-D int64 constant."""
        return self.constant(np.array(values, dtype=np.int64))

    def int_scalar(self, value: int) -> ir.Value:
        """Return a 0-D int64 constant."""
        return self.constant(np.array(value, dtype=np.int64))

    def scalar(self, value: float) -> ir.Value:
        """Return a 0-D constant of the graph's floating-point type."""
        return self.constant(np.array(value, dtype=self.dtype.numpy()))

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], npt.NDArray[Any]]
    ) -> ir.Value:
        """Return a named initializer whose content is computed while it is written to disk, and not kept.

        Raises:
            ValueError: the name is taken by an initializer of another type or shape.
        """
        size = ir.Shape(list(shape))
        found = self._initializers.get(name)
        if found is None:
            return self._store(name, ir.LazyTensor(lambda: ir.Tensor(load()), dtype=dtype, shape=size, name=name))
        if found.dtype != dtype or found.shape != size:
            raise ValueError(
                f"initializer '{name}' is in the graph already as {found.dtype}{found.shape}, not {dtype}{size}"
            )
        return found

    def _store(self, key: str, tensor: ir.Tensor[Any] | ir.LazyTensor) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._initializers[key] = value
        return value

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        """Return ``x`` of type ``source`` as ``target``; no node where the two are equal."""
        return x if source == target else self.op("Cast", x, to=int(target))

    def to_float32(self, x: ir.Value) -> ir.Value:
        """Return a value of the graph's floating-point type as float32."""
        return self.cast(x, self.dtype, ir.DataType.FLOAT)

    def from_float32(self, x: ir.Value) -> ir.Value:
        """Return a float32 value in the graph's floating-point type."""
        return self.cast(x, ir.DataType.FLOAT, self.dtype)

    def reduce_mean_last(self, x: ir.Value) -> ir.Value:
        """Return the mean over the last axis, which is kept with size 1; from opset 18 on the axes are an input."""
        if self.opset >= 18:
            return self.op("ReduceMean", x, self.ints(-1), keepdims=1)
        return self.op("ReduceMean", x, axes=[-1], keepdims=1)

    def build(self, name: str) -> ir.Model:
        """Return the finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self.opset},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="cushion-deploy")


def _equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays have the same type, shape and bytes; a NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
