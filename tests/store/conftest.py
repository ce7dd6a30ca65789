"""A small published bundle for the tests of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cushion_deploy.store import publish, staging_area

FILES = {"model.onnx": b"\x08\x07" * 40, "engines/cpu/engine.json": b"{}", "empty.txt": b"", "tokenizer.json": b"[1]"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return the folder of a bundle of four files."""
    out = tmp_path / "out"
    with staging_area(out) as staged:
        for name, content in FILES.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(content)
        publish(staged, out, {"seed": 3, "search": {"tau": 0.5}}, {"model": "ab" * 32})
    return out
