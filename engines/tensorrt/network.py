"""The network that a parser of TensorRT made of a graph: its linears, its attention, and Q/DQ rules that are broken.

Runs in the worker alone, on objects of the library; returns plain values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

_CONVERSIONS = frozenset({"SHUFFLE", "CAST", "IDENTITY"})
_DEPTH = 4
_ATTENTION = "ATTENTION_OUTPUT"


@dataclass(frozen=True)
class ParsedNetwork:
    """A network with the layer that makes each tensor.

    Attributes:
        trt: the library's module.
        network: its network.
    """

    trt: Any
    network: Any

    @cached_property
    def layers(self) -> list[Any]:
        """Every layer."""
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]

    @cached_property
    def producers(self) -> dict[str, Any]:
        """The layer behind each tensor, by the tensor's name."""
        return {layer.get_output(j).name: layer for layer in self.layers for j in range(layer.num_outputs)}

    def matmuls(self) -> dict[str, Any]:
        """Return the matrix products, sorted into linears and attention.

        A linear has a constant operand, perhaps behind a DQ; the name of that constant leads to its Site. Attention
        that is one operator counts as one product.

        Returns:
            ``linears``: node, weight, and ``broken``, the Q/DQ rule that keeps it from INT8 (empty for none);
            ``attention``: names of products of two computed operands.
        """
        linears, attention = [], []
        for layer in self.layers:
            if kind(layer) == _ATTENTION:
                attention.append(layer.name.removesuffix("_AttentionOutput"))
            if kind(layer) != "MATRIX_MULTIPLY":
                continue
            weights = [i for i in range(2) if self._constant(layer.get_input(i)) is not None]
            if weights:
                side = weights[-1]
                linears.append(
                    {
                        "node": layer.name,
                        "weight": self._constant(layer.get_input(side)),
                        "broken": self._broken_rule(layer, side),
                    }
                )
            else:
                attention.append(layer.name)
        return {"linears": linears, "attention": attention}

    def allow_decomposition(self) -> None:
        """Let attention fall apart into products where no kernel takes its size or type; the build would fail there."""
        for layer in self.layers:
            if kind(layer) == _ATTENTION:
                layer.__class__ = self.trt.IAttentionOutputLayer
                layer.attention.decomposable = True

    def _broken_rule(self, product: Any, weight_side: int) -> str:
        """Return the first rule of INT8 products that this one breaks, in words; empty where none is."""
        weight = self._dequantizer(product.get_input(weight_side))
        activation = self._dequantizer(product.get_input(1 - weight_side))
        if weight is None and activation is None:
            return "both-operands: neither operand is quantized"
        if activation is None:
            return "both-operands: the activation is not quantized"
        if weight is None:
            return "both-operands: the weight is not quantized"
        quantizer = self._behind(activation.get_input(0))
        if quantizer is None or kind(quantizer) != "QUANTIZE":
            return "both-operands: no Q wrote the activation"
        for layer in (quantizer, activation):
            if self._constant(layer.get_input(1)) is None:
                return "activation-scales: the scale of the activation is computed"
            if _size(layer.get_input(1)) != 1:
                return "activation-scales: the activation has more than one scale"
        if self._constant(weight.get_input(1)) is None:
            return "weight-scales: the scale of the weight is computed"
        # As the second operand a weight [in, out] has its output channels on axis 1; as the first, or transposed, on 0.
        # The library hands out layers as their base class; this is its way to reach their own attributes.
        product.__class__, weight.__class__ = self.trt.IMatrixMultiplyLayer, self.trt.IDequantizeLayer
        transposed = (product.op1 if weight_side else product.op0).name == "TRANSPOSE"
        if _size(weight.get_input(1)) != 1 and weight.axis != (weight_side ^ transposed):
            return f"weight-scales: the scale of the weight lies on the contracting axis {weight.axis}"
        return ""

    def _dequantizer(self, tensor: Any) -> Any:
        """Return the DQ that an operand comes from; None where it is in floating point."""
        layer = self._behind(tensor)
        return layer if layer is not None and kind(layer) == "DEQUANTIZE" else None

    def _constant(self, tensor: Any) -> str | None:
        """Return the constant that an operand is made of by conversions and a DQ; None when it is computed."""
        layer = self._behind(tensor)
        if layer is not None and kind(layer) == "DEQUANTIZE":
            layer = self._behind(layer.get_input(0))
        return str(layer.name) if layer is not None and kind(layer) == "CONSTANT" else None

    def _behind(self, tensor: Any) -> Any:
        """Return the layer that makes a tensor, looking through layers which only convert it; None for an input."""
        for _ in range(_DEPTH):
            layer = self.producers.get(tensor.name)
            if layer is None or kind(layer) not in _CONVERSIONS:
                return layer
            tensor = layer.get_input(0)
        return None


def kind(layer: Any) -> str:
    """Return the type of a layer by the name that the library gives it."""
    return str(layer.type.name)


def _size(tensor: Any) -> int:
    size = 1
    for dimension in tensor.shape:
        size *= int(dimension)
    return size
