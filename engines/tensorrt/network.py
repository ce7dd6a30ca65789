"""The network that TensorRT parsed from a graph: its linears, its attention, and the Q/DQ rules that linears break.

Runs only in the worker, on objects of the library, and returns plain values.
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
    """A network, with the layer that produces each tensor.

    Attributes:
        trt: module of the library.
        network: its ``INetworkDefinition``.
    """

    trt: Any
    network: Any

    @cached_property
    def layers(self) -> list[Any]:
        """Every layer."""
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]

    @cached_property
    def producers(self) -> dict[str, Any]:
        """The layer that produces each tensor, by the name of the tensor."""
        return {layer.get_output(j).name: layer for layer in self.layers for j in range(layer.num_outputs)}

    def matmuls(self) -> dict[str, Any]:
        """Return the matrix products, sorted into linears and attention.

        A linear has a constant operand, possibly through a DQ; the name of the constant gives its Site. An attention
        operator counts as one product.

        Returns:
            ``linears``: node, weight, and ``broken``, the Q/DQ rule that prevents INT8 (empty if none does);
            ``attention``: names of the products of two computed operands.
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
        """Let TensorRT decompose attention that no fused kernel supports; otherwise the build would fail."""
        for layer in self.layers:
            if kind(layer) == _ATTENTION:
                layer.__class__ = self.trt.IAttentionOutputLayer
                layer.attention.decomposable = True

    def _broken_rule(self, product: Any, weight_side: int) -> str:
        """Return the first rule of INT8 products that this one breaks, in words; empty if it breaks none."""
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
        # The library returns layers as their base class; setting __class__ is its documented way to downcast.
        product.__class__, weight.__class__ = self.trt.IMatrixMultiplyLayer, self.trt.IDequantizeLayer
        transposed = (product.op1 if weight_side else product.op0).name == "TRANSPOSE"
        if _size(weight.get_input(1)) != 1 and weight.axis != (weight_side ^ transposed):
            return f"weight-scales: the scale of the weight lies on the contracting axis {weight.axis}"
        return ""

    def _dequantizer(self, tensor: Any) -> Any:
        """Return the DQ that an operand comes from, or None if it is in floating point."""
        layer = self._behind(tensor)
        return layer if layer is not None and kind(layer) == "DEQUANTIZE" else None

    def _constant(self, tensor: Any) -> str | None:
        """Return the name of the constant behind conversions and a DQ, or None if the operand is computed."""
        layer = self._behind(tensor)
        if layer is not None and kind(layer) == "DEQUANTIZE":
            layer = self._behind(layer.get_input(0))
        return str(layer.name) if layer is not None and kind(layer) == "CONSTANT" else None

    def _behind(self, tensor: Any) -> Any:
        """Return the layer that produces a tensor, skipping layers that only convert it; None for an input."""
        for _ in range(_DEPTH):
            layer = self.producers.get(tensor.name)
            if layer is None or kind(layer) not in _CONVERSIONS:
                return layer
            tensor = layer.get_input(0)
        return None


def kind(layer: Any) -> str:
    """Return the name of the type of a layer."""
    return str(layer.type.name)


def _size(tensor: Any) -> int:
    size = 1
    for dimension in tensor.shape:
        size *= int(dimension)
    return size
