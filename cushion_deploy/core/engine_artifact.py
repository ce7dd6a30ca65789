"""A compiled engine in its folder: what it was made of, where it runs, how much of it is INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.errors import UntrustedArtifact


@dataclass(frozen=True)
class EngineArtifact:
    """A compiled engine in its folder.

    Attributes:
        engine: registry name, e.g. ``onnxruntime``.
        targets: what it runs on, e.g. ``("cpu",)`` or ``("sm80", "sm86")``.
        key: compatibility key: digest over everything that decides whether the engine may be used.
        files: file names inside the engine's folder, the report included.
        linears: linears expected in INT8, counted before packing.
        int8_linears: linears found in INT8 in the compiled engine, counted the same way.
        fused_attention: fused attention kernels found.
        ran: whether the engine was executed on this machine (False where its device is absent).
        details: engine-specific facts (kernel counts, rewrites, options, why it did not run).
        lineage: the graph it was compiled from, and what that was made of.
        versions: distribution to version, of what compiled it.
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
        """Floating-point type and cache capacity of the graph that it was compiled from.

        Raises:
            UntrustedArtifact: the details tell something else.
        """
        dtype, capacity = self.details.get("dtype", "float32"), self.details.get("cache_capacity", 0)
        if dtype not in get_args(Dtype) or type(capacity) is not int or capacity < 0:
            raise UntrustedArtifact(
                f"engine.json of {self.engine} tells of a graph of type {dtype!r:.40} and a cache of {capacity!r:.40}",
                hint="build the bundle again",
            )
        return dtype, capacity

    @property
    def summary(self) -> str:
        """Targets, and of a plan its type, limits, cache and size, in one line."""
        parts, limits = [", ".join(self.targets)], self.details.get("limits")
        if limits:
            parts += [f"{self.form[0]}, batch {limits['batch']}, context {limits['context']:,}"]
            parts += [f"prefill {limits['prefill']:,}", f"{self.details.get('plan_bytes', 0) / 1e6:,.0f} MB"]
            parts += [f"static cache of {self.form[1]:,} slots"] if self.form[1] else []
        return "; ".join([*parts, f"{self.int8_linears} of {self.linears} linears in INT8"])

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
