"""A tiny llama of random weights as an ONNX graph, without torch; and edits that cost one of its linears INT8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.export.write import export_graph
from cushion_deploy.families import get_family

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 2, 4, 2, 16, 64, 128, 256
LIMITS = CompileOptions(max_context=64, max_prefill=16, targets=("sm86",))
SPEC = ModelSpec(
    family="llama",
    source="tiny",
    weights_digest="d" * 64,
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_positions=128,
    norm_eps=1e-5,
    activation="silu",
    rotary=RotaryScaling(10000.0),
    tied_head=True,
    parameters=0,
    bos_token_id=None,
    eos_token_ids=(),
    attention_scale=0.25,
)


class RandomWeights:
    """The tensors of a tiny llama, random and deterministic."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        kv = KV_HEADS * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
        for i in range(LAYERS):
            layer = {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        self._tensors = {
            f"{name}.weight": rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()
        }

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self._tensors[name][start:stop]


def export(folder: Path, *, quantize_head: bool = True, dtype: Any = "float16", **form: Any) -> ExportedGraph:
    """Export the tiny decoder with a prefix of two positions."""
    rng = np.random.default_rng(1)
    shape = (LAYERS, KV_HEADS, 2, HEAD_DIM)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    prefix = Prefix((1, 2), keys, values, SPEC.weights_digest)
    scheme = QuantScheme(quantize_head=quantize_head)
    sites = get_family("llama").linears(SPEC, head=quantize_head)
    scales = ActivationScales(
        dict.fromkeys(sites, 0.02), "max", Lineage(SPEC.weights_digest, prefix.digest, text="c"), tokens=1
    )
    quantization = Quantization(prefix, scheme, scales)
    return export_graph(SPEC, RandomWeights(), quantization, GraphForm(dtype=dtype, **form), folder)


def edited(graph: ExportedGraph, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> ExportedGraph:
    """Return a copy of a graph on disk after an edit of its nodes and small tensors."""
    model = onnx.load(graph.path)
    edit(model)
    path = folder / "edited.onnx"
    onnx.save(model, path, save_as_external_data=True, location="edited.onnx.data")
    return dataclasses.replace(graph, path=path)


def replace_tensor(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Replace an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def scale_the_contracting_axis(model: onnx.ModelProto) -> None:
    """Move the weight scale of one linear from its output to its input channels: valid ONNX, no INT8."""
    for node in model.graph.node:
        if "layers.1.mlp.gate_up.weight_codes" in node.input:
            next(a for a in node.attribute if a.name == "axis").i = 0
    replace_tensor(model, "layers.1.mlp.gate_up.weight_scales", np.full(HIDDEN, 0.01, np.float32))
    replace_tensor(model, "layers.1.mlp.gate_up.weight_zero_points", np.zeros(HIDDEN, np.int8))
