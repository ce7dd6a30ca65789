"""Read where a model comes from: from its model card, its place in the hub's cache, or the metadata of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cushion_deploy.core.origin import Origin
from cushion_deploy.modeling.gguf_header import general_fields
from cushion_deploy.modeling.source import ModelSource, is_hub_id
from cushion_deploy.recipe.text import parse_yaml
from cushion_deploy.store.snapshot import blobs_of

CARD = "README.md"
_HUB = "https://huggingface.co/"
_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.+-]{0,59}")
_LARGEST = 1 << 20
"""Bytes of a model card beyond which it is not read."""


def read_origin(source: ModelSource) -> Origin:
    """Return what is known about the origin of a model; nothing is fetched, and an unreadable card says nothing."""
    if source.kind == "gguf":
        return _of_gguf(source.path)
    return origin_of_card(_card(source.path), _hub_name(source))


def origin_of_card(card: str, base_model: str | None = None) -> Origin:
    """Return the origin that a model card states in its YAML front matter.

    Args:
        card: text of the card; its values are not trusted, and dropped if they are not of the hub's form.
        base_model: the model that the card belongs to; None to take the ``base_model`` that it names.
    """
    data = _front_matter(card)
    base = base_model or next(iter(_texts(data.get("base_model"))), None)
    link = data.get("license_link")
    if base_model and isinstance(link, str) and re.fullmatch(r"[\w./-]+", link):
        link = f"{_HUB}{base_model}/blob/main/{link}"  # a file beside the card
    return _checked(base, data.get("license"), data.get("license_name"), link, data.get("language"))


def _of_gguf(path: Path) -> Origin:
    found = general_fields(path)
    # `general.base_model` is what the model was trained from, not the model.
    address = next((found[k] for k in ("general.source.repo_url", "general.repo_url") if k in found), None)
    base = address.removeprefix(_HUB) if isinstance(address, str) else None
    name, link = found.get("general.license.name"), found.get("general.license.link")
    return _checked(base, found.get("general.license"), name, link, found.get("general.languages"))


def _checked(base: Any, identifier: Any, name: Any, link: Any, languages: Any) -> Origin:
    return Origin(
        base_model=base if isinstance(base, str) and is_hub_id(base) else None,
        license=_matching(identifier),
        license_name=name if isinstance(name, str) and name.isprintable() and len(name) < 200 else None,
        license_link=link if isinstance(link, str) and re.fullmatch(r"https?://[^\s\"'<>]{1,300}", link) else None,
        languages=tuple(code for code in _texts(languages) if _matching(code)),
    )


def _matching(value: Any) -> str | None:
    return value if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else None


def _texts(value: Any) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _front_matter(card: str) -> Mapping[str, Any]:
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    try:
        data = parse_yaml(found[1]) if found else {}
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _card(folder: Path) -> str:
    try:
        with open(folder / CARD, encoding="utf-8") as file:
            return file.read(_LARGEST)
    except (OSError, UnicodeDecodeError):
        return ""


def _hub_name(source: ModelSource) -> str | None:
    """Return the hub id of a folder: as it was given, or as the hub's cache names it."""
    if blobs_of(source.path) is not None:
        return source.path.resolve().parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return None
