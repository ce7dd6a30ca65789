"""Activation functions of the MLP as nodes of the graph."""

from __future__ import annotations

import math

import onnx_ir as ir

from cushion_deploy.export.builder import GraphBuilder


def add_activation(g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """Return an activation of ``x``: ``relu``, ``silu``, ``gelu`` (exact) or ``gelu_tanh`` (its approximation)."""
    if name == "relu":
        return g.op("Relu", x)
    if name == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x))
    if name == "gelu":
        bent = g.op("Erf", g.op("Mul", x, g.scalar(math.sqrt(0.5))))
    else:
        cube = g.op("Mul", g.op("Mul", x, x), g.op("Mul", x, g.scalar(0.044715)))
        bent = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.scalar(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, g.scalar(0.5)), g.op("Add", bent, g.scalar(1.0)))
