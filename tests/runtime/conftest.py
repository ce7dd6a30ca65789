"""Fixtures of the tiny Llama, its bundle, and a device that checks every call."""

from __future__ import annotations

from fake_plans import device
from tiny_llama import any_tokenizer, bundle_path, fallback_tokenizer, hf_folder, ids, session, tiny, tokenizer

__all__ = [
    "any_tokenizer",
    "bundle_path",
    "device",
    "fallback_tokenizer",
    "hf_folder",
    "ids",
    "session",
    "tiny",
    "tokenizer",
]
