"""Tests for a machine with an NVIDIA GPU: `make test-gpu`. Elsewhere every one of them is 'not run: no GPU'."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_plans import Device

from cushion_deploy.engines.probe import probe
from cushion_deploy.engines.registry import ENGINES, why_missing
from cushion_deploy.engines.tensorrt.flavours import FLAVOURS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", params=FLAVOURS.values(), ids=lambda flavour: flavour.name)
def device(request: pytest.FixtureRequest) -> Device:
    """Return the first device with each flavour of TensorRT; skip where there is none to run on."""
    flavour = request.param
    found = probe(flavour.module)
    if not found.gpus:
        # Whichever library is looked at: without a driver there is nothing to run on.
        pytest.skip("not run: no GPU")
    if (missing := why_missing(ENGINES[flavour.name])) is not None:
        pytest.skip(f"not run: {missing.message}")
    pytest.importorskip("cuda.bindings.runtime", reason="not run: cuda-bindings is not installed")
    target = found.gpus[0].partition(" ")[0]
    if flavour.ahead_of_time and target not in flavour.targets:
        pytest.skip(f"not run: {flavour.product} builds no plan for {found.gpus[0]}")
    return Device(flavour, target)
