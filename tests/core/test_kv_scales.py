"""Scales of an INT8 cache: checked on construction, the same after JSON, and codes as numpy rounds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.artifacts import read_kv_scales, write_kv_scales
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.errors import UntrustedArtifact, UsageError

RNG = np.random.default_rng(2)


def scales(granularity: str = "per-head") -> KvScales:
    keys, values = (RNG.uniform(0.01, 0.2, (3, 2)).astype(np.float32) for _ in range(2))
    if granularity == "per-tensor":
        keys[:], values[:] = keys[:, :1], values[:, :1]
    return KvScales(keys, values, granularity, "max", Lineage("model", "prefix", text="corpus"), 7)


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
def test_a_file_gives_back_every_bit(granularity: str, tmp_path: Path) -> None:
    written = scales(granularity)
    write_kv_scales(written, tmp_path / "kv_scales.json")
    read = read_kv_scales(tmp_path / "kv_scales.json")
    assert read.keys.tobytes() == written.keys.tobytes()
    assert read.values.tobytes() == written.values.tobytes()
    assert read.digest == written.digest
    assert replace(read, with_prefix=True).digest != written.digest


def test_codes_of_a_prefix_are_rounded_half_to_even_by_the_scale_of_their_head() -> None:
    found = scales()
    keys, values = (RNG.normal(0, 5, (3, 2, 4, 8)).astype(np.float32) for _ in range(2))
    keys[0, 0, 0, :2] = np.float32([0.5, 2.5]) * found.keys[0, 0]
    key_codes, value_codes = found.codes(Prefix((1, 2, 3, 4), keys, values, "model"))
    for layer in range(3):
        for head in range(2):
            for codes, floats, steps in ((key_codes, keys, found.keys), (value_codes, values, found.values)):
                ratio = (floats[layer, head] / steps[layer, head]).astype(np.float32)
                np.testing.assert_array_equal(codes[layer, head], np.clip(np.rint(ratio), -128, 127))
    assert key_codes.dtype == value_codes.dtype == np.int8


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-40, float("nan"), float("inf")])
def test_a_scale_that_nothing_can_be_divided_by_is_named(bad: float) -> None:
    good = scales()
    values = good.values.copy()
    values[1, 1] = bad
    with pytest.raises(UsageError, match=r"layers\.1\.kv\.value"):
        replace(good, values=values)


def test_shapes_and_granularity_are_checked() -> None:
    good = scales()
    with pytest.raises(UsageError, match="not two equal"):
        replace(good, values=good.values[:2])
    with pytest.raises(UsageError, match="per-tensor scales differ"):
        replace(good, granularity="per-tensor")
    with pytest.raises(UsageError, match="granularity of cache scales"):
        replace(good, granularity="per-channel")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "kv_scales.json"
    with pytest.raises(UsageError, match="does not exist"):
        read_kv_scales(file)
    for text in ("[]", "{", json.dumps({**scales().to_json(), "more": 1}), json.dumps({"keys": [[1]]})):
        file.write_text(text)
        with pytest.raises(UntrustedArtifact, match="not a file of cache scales"):
            read_kv_scales(file)


@pytest.mark.parametrize(
    "change", [{"tokens": "many"}, {"with_prefix": "no"}, {"estimator": 7}, {"granularity": "per-channel"}]
)
def test_a_file_that_tells_nonsense_is_not_trusted(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "kv_scales.json"
    file.write_text(json.dumps({**scales().to_json(), **change}))
    with pytest.raises(UntrustedArtifact, match="not a file of cache scales"):
        read_kv_scales(file)
