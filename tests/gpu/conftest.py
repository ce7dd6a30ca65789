"""Tests for a machine with an NVIDIA GPU: `make test-gpu`. Elsewhere every one of them is 'not run: no GPU'."""

from __future__ import annotations

from pathlib import Path

import pytest

from cushion_deploy.engines.flavours import RTX
from cushion_deploy.engines.probe import probe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def target() -> str:
    """Return the compute capability of the first device, e.g. ``sm86``; skip where there is none to run on."""
    pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed")
    gpus = probe("tensorrt_rtx").gpus
    if not gpus:
        pytest.skip("not run: no GPU")
    pytest.importorskip("cuda.bindings.runtime", reason="not run: cuda-bindings is not installed")
    found = gpus[0].partition(" ")[0]
    if found not in RTX.targets:
        pytest.skip(f"not run: TensorRT-RTX builds no plan for {gpus[0]}")
    return found
