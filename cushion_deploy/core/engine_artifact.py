"""A compiled engine: what it was compiled from, where it runs, how much of it is INT8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.store.files import replace_file

ENGINE_FILE = "engine.json"
"""Name of the file in an engine's folder that holds its :class:`EngineArtifact`."""


@dataclass(frozen=True)
class EngineArtifact:
    """A compiled engine, as ``engine.json`` describes it.

    Attributes:
        engine: registry name, e.g. ``onnxruntime``.
        targets: what it runs on, e.g. ``("cpu",)`` or ``("sm80", "sm86")``.
        key: compatibility key: digest of everything that determines the compiled engine.
        files: names of the files in the engine's folder, ``engine.json`` included.
        linears: linears expected in INT8, counted before packing.
        int8_linears: linears found in INT8 in the compiled engine, counted the same way.
        fused_attention: fused attention kernels found.
        ran: whether the engine was executed where it was compiled: what happened, not what could happen.
        details: engine-specific facts (kernel counts, rewrites, options, why it did not run).
        lineage: the graph that the engine was compiled from, and the digests behind that graph.
        versions: versions of the distributions that compiled it.
    """

    engine: str
    targets: tuple[str, ...]
    key: str
    files: tuple[str, ...]
    linears: int
    int8_linears: int
    fused_attention: int
    ran: bool
    details: Mapping[str, Any]
    lineage: Lineage
    versions: Mapping[str, str]

    @property
    def form(self) -> tuple[Dtype, int]:
        """Floating-point type and cache capacity of the graph that the engine was compiled from.

        Raises:
            UntrustedArtifact: the details contain no valid type or capacity.
        """
        dtype, capacity = self.details.get("dtype", "float32"), self.details.get("cache_capacity", 0)
        if dtype not in get_args(Dtype) or type(capacity) is not int or capacity < 0:
            raise UntrustedArtifact(
                f"engine.json of {self.engine} describes a graph of type {dtype!r:.40} and a cache of {capacity!r:.40}",
                hint="build the bundle again",
            )
        return dtype, capacity

    @property
    def summary(self) -> str:
        """Targets and INT8 coverage, or what is multiplied instead, in one line; for a plan also what it admits."""
        parts, limits = [", ".join(self.targets)], self.details.get("limits")
        if limits:
            parts += [f"{self.form[0]}, batch {limits['batch']}, context {limits['context']:,}"]
            parts += [f"prefill {limits['prefill']:,}", f"{self.details.get('plan_bytes', 0) / 1e6:,.0f} MB"]
            parts += [f"static cache of {self.form[1]:,} slots"] if self.form[1] else []
        return "; ".join([*parts, self.coverage])

    @property
    def coverage(self) -> str:
        """How many linears are in INT8, or what they multiply on a device where INT8 is slower."""
        if dtype := self.details.get("float_products"):
            said = self.details.get("remarks") or [f"{self.linears} linears multiply {dtype} values of the INT8 codes"]
            return "; ".join(map(str, said))
        if self.details.get("uncounted"):
            return f"INT8 is not counted in {self.linears} linears"
        return f"{self.int8_linears} of {self.linears} linears in INT8"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        data = {**asdict(self), "parents": {**self.lineage.to_json(), **self.versions}}
        del data["lineage"], data["versions"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineArtifact:
        """Rebuild from :meth:`to_json`."""
        d = dict(data)
        d["targets"], d["files"] = tuple(d["targets"]), tuple(d["files"])
        parents = d.pop("parents")
        d["lineage"] = Lineage.from_json(parents)
        d["versions"] = {name: value for name, value in parents.items() if name not in Lineage.names_in_files()}
        return cls(**d)


def write_artifact(artifact: EngineArtifact, folder: Path) -> None:
    """Write ``engine.json`` into ``folder`` atomically."""
    text = json.dumps(artifact.to_json(), indent=1, sort_keys=True) + "\n"
    replace_file(folder / ENGINE_FILE, text.encode())


def read_artifact(folder: Path) -> EngineArtifact:
    """Return the engine that ``engine.json`` in ``folder`` describes; raises UntrustedArtifact if it is invalid."""
    file = folder / ENGINE_FILE
    try:
        return EngineArtifact.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError) as e:
        raise UntrustedArtifact(f"{file} does not describe an engine: {e}", hint="build the bundle again") from e
