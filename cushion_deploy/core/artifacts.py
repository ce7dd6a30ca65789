"""Read and write prefixes, smoothing factors and scales in portable formats: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvScales
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store.files import write_file

SCALES_FILE = "scales.json"
SMOOTHING_FILE = "smoothing.safetensors"
T = TypeVar("T")
_REBUILD = "build the bundle again"
_METADATA = "cushion"
_PREFIX_FORMAT = "cushion-prefix-1"
_SMOOTHING_FORMAT = "cushion-smoothing-1"


def write_prefix(prefix: Prefix, path: Path) -> None:
    """Write keys and values (float32) and token ids (int64); ``slides`` and the model's digest are metadata."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "keys": np.ascontiguousarray(prefix.keys),
        "values": np.ascontiguousarray(prefix.values),
        "token_ids": np.asarray(prefix.token_ids, dtype=np.int64),
    }
    # A single metadata entry, because safetensors writes several in an order that differs between runs.
    slides = {"slides": True} if prefix.slides else {}
    facts = json.dumps({"format": _PREFIX_FORMAT, "model_digest": prefix.model_digest, **slides})
    write_file(path, save(tensors, metadata={_METADATA: facts}))


def read_prefix(path: Path) -> Prefix:
    """Read a prefix written by :func:`write_prefix`.

    Raises:
        UsageError: the file does not exist.
        UntrustedArtifact: the file is not a prefix file, or is damaged.
    """
    hint = "give a prefix.safetensors written by `cushion-deploy search`"
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint=hint)
    try:
        with safe_open(path, framework="np") as f:
            metadata = json.loads((f.metadata() or {}).get(_METADATA, "{}"))
            if metadata.get("format") != _PREFIX_FORMAT:
                raise UntrustedArtifact(f"{path} is not a prefix file", hint=hint)
            ids = tuple(int(i) for i in f.get_tensor("token_ids"))
            tensors = f.get_tensor("keys"), f.get_tensor("values")
            return Prefix(ids, *tensors, metadata["model_digest"], bool(metadata.get("slides", False)))
    except (SafetensorError, AttributeError, KeyError, ValueError) as e:
        raise UntrustedArtifact(f"{path} is damaged: {e}", hint=hint) from e


def read_cached_prefix(graph: ExportedGraph) -> Prefix | None:
    """Return the prefix that every cache of a graph starts with; None if the graph contains the prefix or has none.

    Raises:
        UsageError: the file is not in the graph's folder.
        UntrustedArtifact: the file is damaged, or belongs to another graph.
    """
    if not graph.contract.prefix_slots:
        return None
    file = graph.path.with_name(PREFIX_FILE)
    prefix = read_prefix(file)
    graph.lineage.require(
        f"{file}: {graph.path.name} was made for",
        _REBUILD,
        {"prefix": prefix.digest},
        UntrustedArtifact,
    )
    return prefix


def write_smoothing(smoothing: Smoothing, path: Path) -> None:
    """Write the factors, one float32 tensor per Site; alpha, rotations and the model's digest are metadata."""
    tensors = {str(site): np.ascontiguousarray(factor) for site, factor in smoothing.factors.items()}
    facts: dict[str, Any] = {"format": _SMOOTHING_FORMAT, "alpha": smoothing.alpha}
    facts |= {"model_digest": smoothing.model_digest, "rotations": dict(smoothing.rotations)}
    write_file(path, save(tensors, metadata={_METADATA: json.dumps(facts)}))


def read_smoothing(path: Path) -> Smoothing:
    """Read smoothing factors written by :func:`write_smoothing`.

    Raises:
        UsageError: the file does not exist.
        UntrustedArtifact: the file is not a smoothing file, or is damaged.
    """
    hint = "give a smoothing.safetensors written by `cushion-deploy calibrate`"
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint=hint)
    try:
        with safe_open(path, framework="np") as f:
            metadata = json.loads((f.metadata() or {}).get(_METADATA, "{}"))
            if metadata.get("format") != _SMOOTHING_FORMAT:
                raise UntrustedArtifact(f"{path} is not a smoothing file", hint=hint)
            factors = {Site(name): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            alpha = None if metadata["alpha"] is None else float(metadata["alpha"])
            rotations = {Site(site): int(block) for site, block in metadata.get("rotations", {}).items()}
            return Smoothing(factors, alpha, str(metadata["model_digest"]), rotations)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UntrustedArtifact(f"{path} is damaged: {e}", hint=hint) from e


def write_scales(scales: ActivationScales, path: Path) -> None:
    """Write activation scales as JSON."""
    _write_json(scales.to_json(), path)


def read_scales(path: Path) -> ActivationScales:
    """Read activation scales written by :func:`write_scales`.

    Raises:
        UsageError: the file does not exist.
        UntrustedArtifact: the file is not a scales file.
    """
    return _read_json(path, "a scales file", SCALES_FILE, ActivationScales.from_json)


def write_kv_scales(scales: KvScales, path: Path) -> None:
    """Write the scales of an INT8 cache as JSON."""
    _write_json(scales.to_json(), path)


def read_kv_scales(path: Path) -> KvScales:
    """Read cache scales written by :func:`write_kv_scales`.

    Raises:
        UsageError: the file does not exist.
        UntrustedArtifact: the file does not contain cache scales.
    """
    return _read_json(path, "a file of cache scales", KV_SCALES_FILE, KvScales.from_json)


def read_cached_scales(graph: ExportedGraph) -> KvScales | None:
    """Return the scales of a graph's INT8 cache; None if the cache is in floating point.

    Raises:
        UsageError: the file is not in the graph's folder.
        UntrustedArtifact: the file is damaged, or belongs to another graph.
    """
    if not graph.contract.quantized_cache:
        return None
    file = graph.path.with_name(KV_SCALES_FILE)
    scales = read_kv_scales(file)
    graph.lineage.require(
        f"{file}: {graph.path.name} was made with",
        _REBUILD,
        {"kv_scales": scales.digest},
        UntrustedArtifact,
    )
    return scales


def _write_json(content: dict[str, Any], path: Path) -> None:
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _read_json(path: Path, what: str, name: str, parse: Callable[[Any], T]) -> T:
    hint = f"give a {name} written by `cushion-deploy calibrate`"
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint=hint)
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as e:
        raise UntrustedArtifact(f"{path} is not {what}: {e}", hint=hint) from e
