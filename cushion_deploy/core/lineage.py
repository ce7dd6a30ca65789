"""What an artifact was made from, and the check that artifacts which are used together belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from cushion_deploy.errors import CushionError, UsageError

_IN_FILES = {"kv_scales": "kv scales"}
"""Names of parts in files that differ from those of the attributes."""
_OTHER = {
    **{part: f"another {part}" for part in ("model", "prefix", "smoothing", "text", "scheme", "graph")},
    "scales": "other activation scales",
    "kv_scales": "other cache scales",
}
_OF_SCALES = {
    "model_digest": "model",
    "prefix_digest": "prefix",
    "corpus_digest": "text",
    "smoothing_digest": "smoothing",
}


@dataclass(frozen=True)
class Lineage:
    """Digests (SHA-256, hex) of everything that an artifact was made from; empty for parts it does not depend on.

    Attributes:
        model: the weights and everything that determines how they run.
        prefix: keys and values of the prefix.
        smoothing: the factors that were folded into the weights.
        text: the calibration text.
        scheme: the quantization scheme.
        scales: static activation scales.
        kv_scales: scales of an INT8 cache.
        graph: the exported graph.
    """

    model: str = ""
    prefix: str = ""
    smoothing: str = ""
    text: str = ""
    scheme: str = ""
    scales: str = ""
    kv_scales: str = ""
    graph: str = ""

    def differences(self, expected: Mapping[str, str]) -> tuple[str, ...]:
        """Return the parts whose digest is not the expected one, as phrases such as ``another prefix``."""
        return tuple(_OTHER[part] for part, digest in expected.items() if getattr(self, part) != digest)

    def require(
        self, made: str, hint: str, expected: Mapping[str, str], error: type[CushionError] = UsageError
    ) -> None:
        """Reject an artifact that was not made from the parts that it is used with.

        Args:
            made: the artifact and how it was made, such as ``the scales were calibrated under``.
            hint: how to resolve the mismatch.
            expected: the expected digest of each part that has to match.
            error: type of the exception.

        Raises:
            CushionError: of type ``error``; the message names the first part that differs.
        """
        if different := self.differences(expected):
            raise error(f"{made} {different[0]}", hint=hint)

    def to_json(self) -> dict[str, str]:
        """Return the parts that are set."""
        return {_IN_FILES.get(part, part): digest for part, digest in vars(self).items() if digest}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Lineage:
        """Rebuild from :meth:`to_json`; other keys are ignored."""
        found = {field.name: data.get(_IN_FILES.get(field.name, field.name), "") for field in fields(cls)}
        return cls(**found)

    def to_scales(self) -> dict[str, str]:
        """Return the parts that determine calibrated scales, under the keys of a scales file."""
        return {key: getattr(self, part) for key, part in _OF_SCALES.items()}

    @classmethod
    def from_scales(cls, data: Mapping[str, str]) -> Lineage:
        """Return the lineage in a scales file; raises KeyError or TypeError if a digest is missing."""
        found = {part: data[key] for key, part in _OF_SCALES.items() if part != "smoothing" or key in data}
        for part, digest in found.items():
            if not isinstance(digest, str):
                raise TypeError(f"{part}_digest is {digest!r:.40}, expected a text")
        return cls(**found)

    @classmethod
    def names_in_files(cls) -> frozenset[str]:
        """Return the keys that :meth:`to_json` may write."""
        return frozenset(_IN_FILES.get(field.name, field.name) for field in fields(cls))
