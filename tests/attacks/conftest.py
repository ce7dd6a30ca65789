"""A bundle to attack: real, small, and made anew for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

from cushion_deploy.store import publish, staging_area

FILES = {
    "model.onnx": bytes(range(256)),
    "model.onnx.data": b"\x00" * 300,
    "engines/cpu/engine.json": b"{}",
    "empty.txt": b"",
}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle that is never changed, to copy from."""
    out = tmp_path_factory.mktemp("pristine") / "bundle"
    with staging_area(out) as staged:
        for name, content in FILES.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(content)
        publish(staged, out, {"seed": 3, "search": {"tau": 0.5}, "precision": "w8a8"}, {"model": "ab" * 32})
    return out
