"""A model with more than a billion parameters: write it in shards, export, open, run and compile it; measure memory.

    python bench/large_model.py FOLDER [--layers 28] [--keep]

The weights are random and the activation scales constant, because time and memory do not depend on their values. Each
step runs in its own process, so that its peak memory can be measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = ("write", "export-float32", "export-float16", "run", "compile")
VOCAB, HIDDEN, INNER, HEADS, KV_HEADS = 50_000, 2048, 8192, 32, 8
SCALE = 0.05


def main() -> None:
    """Run every step in a child process and print the measurements as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        begin = time.monotonic()
        found = _run(given.step, given.folder, given.layers)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**found, "seconds": round(time.monotonic() - begin, 1), "peak_rss_bytes": peak}))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for step in STEPS:
        command = [sys.executable, __file__, str(given.folder), "--layers", str(given.layers), "--step", step]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{step} failed:\n{done.stderr[-4000:]}")
        result[step] = json.loads(done.stdout.splitlines()[-1])
        print(f"{step}: {result[step]}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    if not given.keep:
        shutil.rmtree(given.folder)


def _run(step: str, folder: Path, layers: int) -> dict[str, Any]:
    model = folder / "model"
    if step == "write":
        return _write(model, layers)
    dtype = "float16" if step in ("export-float16", "compile") else "float32"
    graphs = folder / dtype
    if step.startswith("export"):
        return _export(model, graphs, dtype)
    from cushion_deploy.runtime.bundle import read_graph

    graph = read_graph(graphs)
    if step == "run":
        return _decode(graph)
    from cushion_deploy.engines.base import CompileOptions
    from cushion_deploy.engines.registry import ENGINES

    plan = folder / "plan"
    plan.mkdir()
    artifact = ENGINES["tensorrt-rtx"].compile(graph, plan, CompileOptions())
    return {"int8_linears": artifact.int8_linears, "linears": artifact.linears, "details": dict(artifact.details)}


def _write(folder: Path, layers: int) -> dict[str, Any]:
    """Write a random Llama model layer by layer, one bfloat16 shard per layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator, weight_map, parameters = torch.Generator().manual_seed(0), {}, 0
    kv = KV_HEADS * HIDDEN // HEADS
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    for i in range(layers + 1):
        if i == layers:
            shard = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
            shard["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        else:
            shard = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in linears.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        name = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        parameters += sum(tensor.numel() for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"parameters": parameters, "bytes": _size(folder)}


def _export(model: Path, folder: Path, dtype: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cushion_deploy.core.graph_form import GraphForm
    from cushion_deploy.core.lineage import Lineage
    from cushion_deploy.core.prefix import Prefix
    from cushion_deploy.core.quantization import Quantization
    from cushion_deploy.core.scales import ActivationScales
    from cushion_deploy.core.schemes import QuantScheme
    from cushion_deploy.export.write import export_graph
    from cushion_deploy.families import get_family
    from cushion_deploy.modeling.checkpoint import Checkpoint
    from cushion_deploy.modeling.describe import describe
    from cushion_deploy.modeling.source import ModelSource

    family = get_family("llama")
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    spec = describe(module, family, ModelSource("folder", model, "random", None, "0" * 64, "0" * 64))
    prefix, sites = Prefix.empty(spec), family.linears(spec, head=True)
    scales = ActivationScales(dict.fromkeys(sites, SCALE), "max", Lineage(spec.weights_digest, prefix.digest), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    folder.mkdir()
    weights = Checkpoint(model, family)
    quantization, form = Quantization(prefix, QuantScheme(), scales), GraphForm(dtype=dtype)  # type: ignore[arg-type]
    graph = export_graph(spec, weights, quantization, form, folder)
    (folder / "export.json").write_text(json.dumps(graph.to_json()))
    largest = 4 * max(VOCAB * HIDDEN, INNER * HIDDEN)
    return {"bytes": _size(folder), "rss_before_bytes": before, "largest_tensor_bytes": largest}


def _decode(graph: Any) -> dict[str, Any]:
    """Open the graph in ONNX Runtime and run a prompt and one decode step."""
    import numpy as np

    from cushion_deploy.engines.onnxruntime.session import open_session

    begin = time.monotonic()
    session = open_session(graph)
    opened = time.monotonic() - begin
    ids = np.arange(16, dtype=np.int64)[None]
    logits = [session.run(ids), session.run(ids[:, :1])]
    return {"open_seconds": round(opened, 1), "finite": all(bool(np.isfinite(row).all()) for row in logits)}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
