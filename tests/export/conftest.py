"""Random llamas of the real config class, their graphs on disk, and transformers as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.families import get_family
from cushion_deploy.modeling.checkpoint import Checkpoint
from cushion_deploy.modeling.describe import describe
from cushion_deploy.modeling.load import bind_sites
from cushion_deploy.modeling.placement import PlacedWeights
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

BASE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

MakeModel = Callable[..., TorchRunner]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function from LlamaConfig options to a random model whose biases and norms are random too."""
    made: dict[str, TorchRunner] = {}

    def make(**options: Any) -> TorchRunner:
        key = repr(sorted(options.items()))
        if key not in made:
            torch.manual_seed(0)
            module = LlamaForCausalLM(LlamaConfig(**{**BASE, **options})).eval().requires_grad_(False)
            for name, parameter in module.named_parameters():
                if "norm" in name or name.endswith(".bias"):
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
            folder = tmp_path_factory.mktemp("hf")
            module.save_pretrained(folder)
            source = resolve_source(str(folder))
            family = get_family("llama")
            spec = describe(module, family, source)
            sites = bind_sites(module, family, spec)
            weights = Checkpoint(folder, family)
            placed = PlacedWeights(module, weights, family, spec, torch.device("cpu"), torch.float32)
            made[key] = TorchRunner(spec, family, module, None, sites, weights, folder, placed)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_scales() -> Callable[[TorchRunner, Prefix], ActivationScales]:
    """Return a function that gives every Site another plausible scale."""

    def make(model: TorchRunner, prefix: Prefix) -> ActivationScales:
        values = {site: float(np.float32(0.02 + 0.001 * i)) for i, site in enumerate(model.sites)}
        return ActivationScales(values, "max", Lineage(model.spec.weights_digest, prefix.digest, text="corpus"), 1)

    return make


@pytest.fixture(scope="session")
def export_float(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportedGraph]:
    """Return a function that exports the float graph of a model behind the prefix of some tokens."""

    def export(model: TorchRunner, tokens: tuple[int, ...] = (), name: str = "model", **form: Any) -> ExportedGraph:
        quantization = Quantization(model.compute_prefix(tokens), QuantScheme())
        folder = tmp_path_factory.mktemp("graph")
        twin = GraphForm(quantized=False, **form)
        return export_graph(model.spec, model.weights, quantization, twin, folder, name=name)

    return export


@pytest.fixture(scope="session")
def cache_scales() -> Callable[..., KvScales]:
    """Return a function that gives every head another plausible cache scale."""

    def make(model: TorchRunner, prefix: Prefix, granularity: Any = "per-head", with_prefix: bool = False) -> KvScales:
        shape = (model.spec.num_layers, model.spec.num_kv_heads)
        keys = (0.03 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)).astype(np.float32)
        if granularity == "per-tensor":
            keys[:] = keys[:, :1]
        parents = (granularity, "max", Lineage(model.spec.weights_digest, prefix.digest, text="c"), 1)
        return KvScales(keys, (keys / 2).astype(np.float32), *parents, with_prefix=with_prefix)

    return make


@pytest.fixture
def export_cached(make_model: MakeModel, cache_scales: Callable[..., KvScales], tmp_path: Path) -> Any:
    """Return a function that exports the random model with float linears and an INT8 cache, and its scales."""

    def make(granularity: str = "per-head", *, cached: bool = False, **form: Any) -> tuple[ExportedGraph, KvScales]:
        model = make_model()
        prefix = model.compute_prefix((7, 1, 100))
        kv = cache_scales(model, prefix, granularity, with_prefix=cached)
        quantization = Quantization(prefix, QuantScheme(), kv_scales=kv)
        given = GraphForm(quantized=False, cache="int8", prefix="cache" if cached else "baked", **form)
        return export_graph(model.spec, model.weights, quantization, given, tmp_path), kv

    return make


@pytest.fixture(scope="session")
def transformers_logits() -> Callable[..., FloatArray]:
    """Return logits of transformers for one row of tokens behind the prefix's own tokens, without any cache."""

    def logits(model: TorchRunner, tokens: tuple[int, ...], row: list[int]) -> FloatArray:
        with torch.inference_mode():
            out = model.module(input_ids=torch.tensor([[*tokens, *row]]), use_cache=False).logits
        return np.asarray(out[0, len(tokens) :].numpy())

    return logits


class Runner:
    """A graph in plain ONNX Runtime, fed by hand."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(
        self,
        ids: IntArray,
        past: Mapping[str, npt.NDArray[Any]] | None = None,
        mask: IntArray | None = None,
        **more: npt.NDArray[Any],
    ) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        """Return logits and ``past_key_values.*`` for the next call."""
        feed: dict[str, Any] = {}
        for i in self.session.get_inputs():
            if i.name.startswith("past"):
                dtype = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(i.type, np.float32)
                feed[i.name] = np.zeros((ids.shape[0], i.shape[1], 0, i.shape[3]), dtype)
        feed |= past or {}
        before = next(v.shape[2] for k, v in feed.items() if k.startswith("past"))
        total = before + ids.shape[1]
        if mask is None:
            mask = np.ones((ids.shape[0], total), np.int64)
        feed["input_ids"], feed["attention_mask"] = ids, mask
        feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, before:]
        names = [o.name for o in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(names, feed | more), strict=True))
        logits = out.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in out.items()}


@pytest.fixture(scope="session")
def runner() -> type[Runner]:
    """Return the class that runs a graph."""
    return Runner
