"""An exported decoder graph on disk, and the contract of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cushion_deploy.core.dtypes import CacheDtype, Dtype
from cushion_deploy.core.kv_scales import KV_SCALES_FILE
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.core.sites import Site

GRAPH_FILE = "export.json"
"""Name of the file beside a graph that holds its :class:`ExportedGraph`."""
PrefixMode = Literal["baked", "cache", "none"]


@dataclass(frozen=True)
class GraphContract:
    """Inputs and outputs of an exported decoder graph.

    ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, past + sequence],
    ``position_ids`` int64 [batch, sequence], ``past_key_values.N.key/value``
    [batch, kv_heads, past, head_dim] -> ``logits`` [batch, sequence, vocab],
    ``present.N.key/value`` [batch, kv_heads, past + sequence, head_dim].
    With ``cache_capacity`` C the cache is static: every ``past + sequence`` above is C, ``past`` is C as well,
    ``write_indices`` int64 [batch] are the slots of the first new tokens, and ``present`` is the updated ``past``.
    A session counts only the tokens of its caller. The prefix is either in the graph, which adds it itself, or, with
    ``prefix_in_cache``, in the first slots of every past; mask and positions then include it.
    Past and present have type ``dtype`` or, with ``quantized_cache``, are int8 codes whose scales are in a file.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: Dtype
    prefix_length: int
    prefix_in_cache: bool = False
    cache_capacity: int = 0
    quantized_cache: bool = False

    @property
    def cache_dtype(self) -> CacheDtype:
        """Type of past and present keys and values."""
        return "int8" if self.quantized_cache else self.dtype

    @property
    def prefix_mode(self) -> PrefixMode:
        """Where the prefix is stored."""
        if not self.prefix_length:
            return "none"
        return "cache" if self.prefix_in_cache else "baked"

    @property
    def prefix_slots(self) -> int:
        """Number of slots at the beginning of every past that hold the prefix; 0 if the graph contains it."""
        return self.prefix_length if self.prefix_in_cache else 0


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX decoder on disk.

    Attributes:
        path: the ``.onnx`` file. In the same folder are its weights as ``<name>.onnx.data``, a prefix for the cache as
            ``prefix.safetensors`` and the scales of an INT8 cache as ``kv_scales.json``.
        contract: its inputs and outputs.
        quantized: whether the graph has Q/DQ nodes at its Sites (False for the float twin).
        sites: every quantized Site (in a float twin: the same Sites), with the linears packed into its MatMul.
        rules: names of the rules that were checked on the graph; empty for a float twin.
        opset: ONNX opset of the default domain.
        digest: SHA-256 over all files.
        lineage: digests of the model, prefix, smoothing, scales and scheme.
        int8_embedding: whether the token embedding is stored as INT8 codes with scales by block.
    """

    path: Path
    contract: GraphContract
    quantized: bool
    sites: Mapping[Site, int]
    rules: tuple[str, ...]
    opset: int
    digest: str
    lineage: Lineage
    int8_embedding: bool = False

    @property
    def linears(self) -> int:
        """Number of linears of the model that have a Site as input, counted before packing."""
        return sum(self.sites.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The graph, its weights, the prefix for the cache if there is one, and the scales of an INT8 cache."""
        beside = [PREFIX_FILE] if self.contract.prefix_slots else []
        beside += [KV_SCALES_FILE] if self.contract.quantized_cache else []
        return self.path, *(self.path.with_name(name) for name in (f"{self.path.name}.data", *beside))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; the path is its file name only; defaults of cache and embedding are omitted."""
        data = {**asdict(self), "path": self.path.name, "parents": self.lineage.to_json()}
        del data["lineage"]
        for form in ("cache_capacity", "quantized_cache"):
            if not data["contract"][form]:
                del data["contract"][form]
        if not self.int8_embedding:
            del data["int8_embedding"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path) -> ExportedGraph:
        """Rebuild from :meth:`to_json`; ``folder`` contains the files."""
        d = dict(data)
        d["path"] = folder / d["path"]
        d["contract"] = GraphContract(**d["contract"])
        d["rules"] = tuple(d["rules"])
        d["lineage"] = Lineage.from_json(d.pop("parents"))
        return cls(**d)
