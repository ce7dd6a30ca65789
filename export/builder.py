"""A thin layer over onnx_ir: append nodes, share constants, keep readable names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

IR_VERSION = 8
"""What ONNX 1.13 writes: old enough for the parser of TensorRT 10.3, new enough for opset 17."""


class GraphBuilder:
    """Collects the nodes and initializers of one graph, in order."""

    def __init__(self, opset: int) -> None:
        """Begin an empty graph of the given default-domain opset."""
        self.opset = opset
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scope = ""

    def scope(self, name: str) -> None:
        """Name the part of the model that the next nodes belong to, e.g. ``layers.3.attn``."""
        self._scope = name

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; string dimensions are symbolic."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self.inputs.append(value)
        return value

    def optional_input(self, name: str, default: npt.NDArray[Any]) -> ir.Value:
        """Declare an initializer that a caller may override; one who does not know of it gets the default."""
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
        """Return an initializer; unnamed equal constants are stored once."""
        key = name or f"const/{array.dtype}/{list(array.shape)}/{array.tobytes().hex()}"
        if key not in self._initializers:
            label = name or f"const_{len(self._initializers)}"
            tensor = ir.Tensor(array, name=label)
            self._initializers[key] = ir.Value(
                name=label, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[key]

    def ints(self, *values: int) -> ir.Value:
        """Return a 1-D int64 constant."""
        return self.constant(np.array(values, dtype=np.int64))

    def int_scalar(self, value: int) -> ir.Value:
        """Return a 0-D int64 constant."""
        return self.constant(np.array(value, dtype=np.int64))

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], npt.NDArray[Any]]
    ) -> ir.Value:
        """Return a named initializer whose content is made only while it is being written."""
        if name not in self._initializers:
            size = ir.Shape(list(shape))
            tensor = ir.LazyTensor(lambda: ir.Tensor(load()), dtype=dtype, shape=size, name=name)
            self._initializers[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=size, const_value=tensor)
        return self._initializers[name]

    def reduce_mean_last(self, x: ir.Value) -> ir.Value:
        """Return the mean over the last axis, kept; the axes became an input in opset 18."""
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
