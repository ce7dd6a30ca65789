"""Prefix and scales on disk: read by anyone's safetensors and JSON, refused when they are not what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cushion_deploy.core.artifacts import (
    read_prefix,
    read_scales,
    read_smoothing,
    write_prefix,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact, UsageError


@pytest.fixture
def prefix() -> Prefix:
    keys = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    return Prefix((5, 1, 9), keys, -keys, "digest of the model")


@pytest.fixture
def scales() -> ActivationScales:
    return ActivationScales({Site("head"): float(np.float32(1) / 3)}, "percentile", Lineage("m", "p", text="c"), 64)


def test_any_safetensors_reader_finds_the_tensors(prefix: Prefix, tmp_path: Path) -> None:
    write_prefix(prefix, tmp_path / "p.safetensors")
    tensors = load_file(tmp_path / "p.safetensors")
    assert tensors["token_ids"].tolist() == [5, 1, 9]
    np.testing.assert_array_equal(tensors["keys"], prefix.keys)
    np.testing.assert_array_equal(tensors["values"], prefix.values)


def test_a_prefix_comes_back_with_its_digest(prefix: Prefix, tmp_path: Path) -> None:
    write_prefix(prefix, tmp_path / "p.safetensors")
    again = read_prefix(tmp_path / "p.safetensors")
    assert (again.digest, again.token_ids, again.model_digest) == (prefix.digest, (5, 1, 9), "digest of the model")


def test_a_prefix_that_windows_move_past_stays_one(prefix: Prefix, tmp_path: Path) -> None:
    sliding = replace(prefix, slides=True)
    write_prefix(sliding, tmp_path / "p.safetensors")
    again = read_prefix(tmp_path / "p.safetensors")
    assert (again.slides, again.digest) == (True, sliding.digest)
    assert sliding.digest != prefix.digest


def test_an_empty_prefix_comes_back_empty(tmp_path: Path) -> None:
    zero = np.zeros((2, 2, 0, 4), dtype=np.float32)
    write_prefix(Prefix((), zero, zero.copy(), "m"), tmp_path / "p.safetensors")
    assert read_prefix(tmp_path / "p.safetensors").length == 0


def test_keys_that_are_not_contiguous_are_written_in_their_order(tmp_path: Path) -> None:
    keys = np.arange(48, dtype=np.float32).reshape(4, 3, 2, 2).transpose(3, 2, 1, 0)
    write_prefix(Prefix((1, 2, 3), keys, keys, "m"), tmp_path / "p.safetensors")
    np.testing.assert_array_equal(read_prefix(tmp_path / "p.safetensors").keys, keys)


def test_a_missing_file_is_bad_usage(tmp_path: Path) -> None:
    for read in (read_prefix, read_scales):
        with pytest.raises(UsageError, match="does not exist"):
            read(tmp_path / "none")


def test_a_prefix_file_cut_anywhere_is_refused(prefix: Prefix, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    write_prefix(prefix, file)
    whole = file.read_bytes()
    for length in (0, 4, 8, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UntrustedArtifact):
            read_prefix(file)


def test_the_same_prefix_is_the_same_bytes(prefix: Prefix, tmp_path: Path) -> None:
    for name in "ab":
        write_prefix(prefix, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_safetensors_file_is_no_prefix(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"keys": np.zeros((1, 1, 1, 1), dtype=np.float32)}, file)
    with pytest.raises(UntrustedArtifact, match="not a prefix file"):
        read_prefix(file)


@pytest.mark.parametrize("gone", ["keys", "values", "token_ids", "model_digest"])
def test_a_prefix_file_that_lacks_a_part_is_refused(prefix: Prefix, tmp_path: Path, gone: str) -> None:
    file = tmp_path / "p.safetensors"
    tensors = {"keys": prefix.keys, "values": prefix.values, "token_ids": np.array([5, 1, 9])}
    metadata = {"format": "cushion-prefix-1", "model_digest": "m"}
    facts = json.dumps({k: v for k, v in metadata.items() if k != gone})
    save_file({k: v for k, v in tensors.items() if k != gone}, file, {"cushion": facts})
    with pytest.raises(UntrustedArtifact, match=gone):
        read_prefix(file)


def test_scales_come_back_and_are_plain_json(scales: ActivationScales, tmp_path: Path) -> None:
    write_scales(scales, tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text())
    assert np.float32(data["scales"]["head"]) == np.float32(1) / np.float32(3)
    assert read_scales(tmp_path / "s.json") == scales


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"scales": {"head": "wide"}}', '{"scales": []}', "\xff"])
def test_what_is_no_scales_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UntrustedArtifact, match="not a scales file"):
        read_scales(file)


def test_a_scales_file_with_an_unknown_key_is_refused(scales: ActivationScales, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({**scales.to_json(), "zero_point": 3}))
    with pytest.raises(UntrustedArtifact, match="zero_point"):
        read_scales(tmp_path / "s.json")


def test_a_smoothing_comes_back_and_any_reader_finds_its_factors(tmp_path: Path) -> None:
    factors = {Site("layers.1.mlp.down"): np.array([2, 0.5], np.float32), Site("layers.0.attn.qkv"): np.ones(3, "f4")}
    smoothing = Smoothing(factors, 0.5, "m", {Site("layers.1.mlp.down"): 2, Site("layers.0.mlp.down"): 2})
    for name in "ab":
        write_smoothing(smoothing, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_file(tmp_path / "a")["layers.1.mlp.down"].tolist() == [2, 0.5]
    again = read_smoothing(tmp_path / "a")
    assert (again.digest, again.alpha, again.model_digest) == (smoothing.digest, 0.5, "m")
    assert again.rotations == smoothing.rotations
    whole = (tmp_path / "a").read_bytes()
    for length in (0, 8, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(UntrustedArtifact):
            read_smoothing(tmp_path / "a")
    with pytest.raises(UsageError, match="does not exist"):
        read_smoothing(tmp_path / "none")


def test_a_smoothing_has_another_digest_where_a_factor_site_or_model_is_another() -> None:
    site = Site("layers.0.attn.qkv")
    base = Smoothing({site: np.ones(3, np.float32)}, 0.5, "m")
    others = [
        Smoothing({site: np.array([1, 1, 2], np.float32)}, 0.5, "m"),
        Smoothing({Site("layers.1.attn.qkv"): np.ones(3, np.float32)}, 0.5, "m"),
        Smoothing({site: np.ones(3, np.float32)}, 0.5, "n"),
        *(Smoothing({site: np.ones(3, np.float32)}, 0.5, "m", {site: block}) for block in (2, 4)),
        Smoothing({}, None, "m", {site: 2}),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 7
    assert Smoothing({}, 0.5, "m").digest == ""


@pytest.mark.parametrize("block", [0, 1, 3, 48, -2])
def test_a_rotation_that_is_no_power_of_two_is_refused(block: int) -> None:
    with pytest.raises(UntrustedArtifact, match="power of two"):
        Smoothing({}, None, "m", {Site("layers.0.mlp.down"): block})
