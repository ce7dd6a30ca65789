"""The tokenizer files of a bundle with a prefix: they add no beginning-of-sequence token, whose place the prefix takes.

Every runtime that turns text into tokens with these files then feeds what ``generate`` feeds.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cushion_deploy.store.json_files import read_json, write_json

logger = logging.getLogger(__name__)
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
WITHOUT_BOS = "{% set bos_token = '' %}\n"
"""Begins a template that shall write no ``bos_token``; the line break behind a block is not rendered."""


def leave_out_bos(folder: Path) -> str:
    """Change the tokenizer files in a folder, and return what was changed in words; empty for nothing.

    Args:
        folder: contains ``tokenizer.json``, ``tokenizer_config.json`` and chat templates, as transformers writes them.
    """
    settings = read_json(folder / SETTINGS)
    token = settings.get("bos_token")
    bos = token.get("content") if isinstance(token, dict) else token
    if not isinstance(bos, str) or not bos:
        return ""
    written = read_json(folder / TOKENIZER)
    processor = _without(written.get("post_processor"), bos)
    added = processor != written.get("post_processor") or bool(settings.get("add_bos_token"))
    if added:
        write_json(folder / TOKENIZER, {**written, "post_processor": processor})
        # Some classes add the token whatever tokenizer.json says. The class stays: onnxruntime-genai chooses its
        # algorithm by the name.
        settings["add_bos_token"] = False
    templates = _silence(folder, settings)
    write_json(folder / SETTINGS, settings)
    parts = [*(["the tokenizer adds"] if added else []), *(["chat templates write"] if templates else [])]
    return f"{' and '.join(parts)} no {bos}: the prefix takes its place" if parts else ""


def _without(processor: Any, bos: str) -> Any:
    """Return a post-processor of tokenizer.json that adds no ``bos``."""
    if not isinstance(processor, dict):
        return processor
    kind = processor.get("type")
    if kind == "Sequence":
        parts = [_without(part, bos) for part in processor["processors"]]
        return {**processor, "processors": parts}
    if kind == "TemplateProcessing":
        return {**processor, **{key: [p for p in processor[key] if not _is(p, bos)] for key in ("single", "pair")}}
    if kind in ("RobertaProcessing", "BertProcessing") and processor["cls"][0] == bos:
        logger.warning("%s in tokenizer.json adds %s and cannot be changed: other runtimes feed it", kind, bos)
    return processor


def _is(piece: dict[str, Any], token: str) -> bool:
    return bool(piece.get("SpecialToken", {}).get("id") == token)


def _silence(folder: Path, settings: dict[str, Any]) -> bool:
    """Make all templates leave ``bos_token`` out, those in ``settings`` in place; return whether one was changed."""
    files = [file for pattern in TEMPLATES for file in sorted(folder.glob(pattern))]
    changed = False
    for file in files:
        text = file.read_text(encoding="utf-8")
        if (found := _silent(text)) != text:
            file.write_text(found, encoding="utf-8", newline="\n")
            changed = True
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        settings["chat_template"] = _silent(inside)
    elif isinstance(inside, list):
        settings["chat_template"] = [{**named, "template": _silent(named["template"])} for named in inside]
    return changed or settings.get("chat_template") != inside


def _silent(template: str) -> str:
    return WITHOUT_BOS + template if "bos_token" in template and not template.startswith(WITHOUT_BOS) else template


def describe_text(keep_bos: bool, changes: str) -> str:
    """Return ``text.json``: whether prompts keep a beginning-of-sequence token, and what was changed for that."""
    return json.dumps({"keep_bos": keep_bos, **({"changes": changes} if changes else {})}) + "\n"
