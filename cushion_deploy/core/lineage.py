"""What an artifact was made of, and the refusal to use it together with anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from cushion_deploy.errors import CushionError, UsageError

_IN_FILES = {"kv_scales": "kv scales"}
"""Names of parts in files, where they are not those of the attributes."""
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
    """Digests (SHA-256, hex) of what an artifact was made of; empty where it does not depend on a part.

    Attributes:
        model: the weights and everything that decides how they run.
        prefix: keys and values of the prefix.
        smoothing: the factors that were folded into the weights.
        text: the calibration text.
        scheme: what is quantized.
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
        """Return which of the given parts have another digest than the expected one, as words: ``another prefix``."""
        return tuple(_OTHER[part] for part, digest in expected.items() if getattr(self, part) != digest)

    def require(
        self, made: str, hint: str, expected: Mapping[str, str], error: type[CushionError] = UsageError
    ) -> None:
        """Refuse an artifact that was made of something else than what it is used with.

        Args:
            made: the artifact and how it was made, such as ``the scales were calibrated under``.
            hint: what to do about it.
            expected: digests by part, for those parts that must agree.
            error: what is raised.

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
        """Rebuild from :meth:`to_json`; other keys are left to the caller."""
        found = {field.name: data.get(_IN_FILES.get(field.name, field.name), "") for field in fields(cls)}
        return cls(**found)

    def to_scales(self) -> dict[str, str]:
        """Return the parts that decide calibrated scales, under the keys of a file of scales."""
        return {key: getattr(self, part) for key, part in _OF_SCALES.items()}

    @classmethod
    def from_scales(cls, data: Mapping[str, str]) -> Lineage:
        """Return the lineage that a file of scales holds; raises KeyError or TypeError where a digest is missing."""
        found = {part: data[key] for key, part in _OF_SCALES.items() if part != "smoothing" or key in data}
        for part, digest in found.items():
            if not isinstance(digest, str):
                raise TypeError(f"{part}_digest is {digest!r:.40}, expected a text")
        return cls(**found)

    @classmethod
    def names_in_files(cls) -> frozenset[str]:
        """Return the keys that :meth:`to_json` may write."""
        return frozenset(_IN_FILES.get(field.name, field.name) for field in fields(cls))
