"""`inspect`: show the contents of a bundle, prefix or scales file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from cushion_deploy.cli.help import FILE, json_option, verb
from cushion_deploy.cli.terminal import echo
from cushion_deploy.core.artifacts import read_kv_scales, read_prefix, read_scales
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvScales
from cushion_deploy.errors import CheckFailed, MissingDependency, UsageError
from cushion_deploy.runtime.hub import local_bundle


@verb("inspect", "inspect OUT", "inspect prefix.safetensors", "inspect scales.json --json")
@click.argument("path", type=FILE)
@json_option()
def command(path: Path, as_json: bool) -> None:
    """Show the contents of PATH: a bundle (a folder or org/name), a prefix.safetensors, or a scales.json.

    For a bundle, this includes the graph, the prefix, the INT8 coverage of every engine, and the INT8 kernels that ONNX
    Runtime uses on this machine.
    """
    facts = _facts(local_bundle(path))
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        echo(f"{name:<{width}}  {f'{value:,}' if name == 'bytes' else value}")


def _facts(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _bundle(path)
    if path.suffix == ".safetensors":
        prefix = read_prefix(path)
        return {
            "kind": "prefix",
            "token ids": list(prefix.token_ids),
            "shape [layers, kv_heads, P, head_dim]": list(prefix.keys.shape),
            "largest key": float(np.abs(prefix.keys).max(initial=0)),
            "largest value": float(np.abs(prefix.values).max(initial=0)),
            "model digest": prefix.model_digest,
            "digest": prefix.digest,
        }
    if path.name == KV_SCALES_FILE:
        return _kv_scales(read_kv_scales(path))
    if path.suffix == ".json":
        scales = read_scales(path)
        values = list(scales.scales.values())
        return {
            "kind": "activation scales",
            "Sites": len(values),
            "estimator": scales.estimator,
            "tokens": scales.tokens,
            "smallest scale": min(values),
            "largest scale": max(values),
            "model digest": scales.lineage.model,
            "prefix digest": scales.lineage.prefix,
        }
    problem = "cannot be inspected" if path.exists() else "does not exist"
    raise UsageError(
        f"{path} {problem}", hint="give a bundle (a folder or org/name), a prefix.safetensors or a scales.json"
    )


def _kv_scales(scales: KvScales) -> dict[str, Any]:
    both = np.stack([scales.keys, scales.values])
    return {
        "kind": "scales of an INT8 key/value cache",
        "scales": scales.granularity,
        "shape [layers, kv_heads]": list(scales.keys.shape),
        "estimator": scales.estimator,
        "tokens": scales.tokens,
        "prefix quantized": scales.with_prefix,
        "smallest scale": float(both.min()),
        "largest scale": float(both.max()),
        "model digest": scales.lineage.model,
        "prefix digest": scales.lineage.prefix,
    }


def _kernels_here() -> dict[str, str]:
    """Return what ONNX Runtime multiplies on this machine; nothing where it is not installed."""
    from cushion_deploy.engines.onnxruntime.kernels import kernels_in_words
    from cushion_deploy.engines.onnxruntime.settings import import_onnxruntime

    try:
        import_onnxruntime()
        return {"onnxruntime on this machine": kernels_in_words()}
    except MissingDependency:
        return {}
    except CheckFailed as error:
        return {"onnxruntime on this machine": error.message}


def _token(tokenizer: Any, token_id: int) -> str:
    return f"{token_id} {tokenizer.id_to_token(token_id)}"


def _bundle(path: Path) -> dict[str, Any]:
    from cushion_deploy.runtime.bundle import open_bundle
    from cushion_deploy.runtime.engine import read_engine

    bundle = open_bundle(path)
    graph, contract = bundle.graph, bundle.contract
    engines = sorted(p.parent.name for p in path.glob("engines/*/engine.json"))
    return {
        "kind": "bundle",
        "model": bundle.manifest.recipe.get("model"),
        "built": str(bundle.manifest.created),
        "linears in the graph": graph.linears,
        "MatMuls after packing": len(graph.sites),
        "opset": graph.opset,
        "prefix": contract.prefix_mode,
        "prefix positions": contract.prefix_length,
        "key/value cache": contract.cache_dtype,
        "longest context": contract.max_positions - contract.prefix_length,
        "end tokens": [_token(bundle.tokenizer, i) for i in bundle.eos_token_ids],
        "engines": engines,
        **{name: read_engine(bundle, name).summary for name in engines},
        **_kernels_here(),
        "files": len(bundle.manifest.files),
        "bytes": sum(entry.size for entry in bundle.manifest.files.values()),
        **{f"{name} digest": digest for name, digest in bundle.manifest.parents.items()},
    }
