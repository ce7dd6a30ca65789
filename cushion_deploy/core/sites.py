"""Names of the quantized inputs: the join key of hooks, scales and Q/DQ nodes."""

from __future__ import annotations

from typing import NewType

Site = NewType("Site", str)
"""Canonical name of a quantized input: ``layers.<i>.<kind>`` or ``head``."""

HEAD_SITE = Site("head")


def layer_site(layer: int, kind: str) -> Site:
    """Return the Site of ``kind`` in a layer; kinds are those of the family's ``SiteRule``."""
    return Site(f"layers.{layer}.{kind}")
