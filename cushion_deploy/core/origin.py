"""Where a model comes from: what its model card says, and a bundle of it repeats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Name and licence of an original model; None or empty where nobody stated them.

    Attributes:
        base_model: hub id of the model.
        license: identifier of the hub, such as ``apache-2.0`` or ``other``.
        license_name, license_link: name and address of a licence that has no identifier.
        languages: language codes.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
