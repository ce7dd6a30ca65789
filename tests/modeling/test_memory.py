"""The memory of a model of a few hundred megabytes: it exists once, whatever is folded into it and quantized."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.smooth import channel_maxima, choose_factors
from cushion_deploy.core.host import own_peak_memory
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.recipe import Compute

tiny, folder, memory = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
ids = np.random.default_rng(0).integers(3, 300, (4, 64))

def everything(folder, memory=None):
    compute = Compute(device="cpu", memory=memory)
    model = load_folder(folder, resolve_source(str(folder)), compute=compute)
    prefix = model.compute_prefix((5,))
    smoothing = choose_factors(model, channel_maxima(model, prefix, ids, np.ones_like(ids)), 0.5)
    folded = model.folded(smoothing)
    scales = choose_scales(observe_sites(folded, prefix, ids, np.ones_like(ids)), RangeEstimator("max"),
                           folded.lineage(prefix), 1)
    with simulated(folded, QuantScheme(), scales):
        folded.token_nll(ids, prefix)
    model.token_nll(ids, prefix)
    return model.placed.resident_bytes

everything(tiny)
before = own_peak_memory()
weights = everything(folder, memory)
print(json.dumps({"weights": weights, "grown": own_peak_memory() - before}))
"""
ACTIVATIONS = 4 * (4 * 768 * 3072 + 6 * 4 * 64 * 3072)
"""Bytes of the largest weight four times and of the widest states six times, in float32: what exists for a moment."""


def measured(tiny: Path, folder: Path, memory: float | None = None) -> dict[str, float]:
    """Return the bytes of the weights, and the growth of the peak of a process that uses the model for everything."""
    line = [sys.executable, "-c", PROGRAM, str(tiny), str(folder), json.dumps(memory)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_is_at_most_1_3_times_the_weights(tiny_folder: Path, large_folder: Path) -> None:
    found = measured(tiny_folder, large_folder)
    assert found["weights"] > 3e8
    assert found["grown"] <= 1.3 * found["weights"] + ACTIVATIONS


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_streamed_model_needs_the_memory_of_one_layer(tiny_folder: Path, large_folder: Path) -> None:
    found = measured(tiny_folder, large_folder, 0.0)
    layer = 4 * (768 * (768 * 2 + 2 * 256) + 3 * 768 * 3072)
    assert found["weights"] < 1e7, "only what is no layer stays"
    assert found["grown"] <= 2 * layer + found["weights"] + ACTIVATIONS
