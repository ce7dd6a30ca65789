"""Artifacts that do not belong together are refused in one sentence that names the part."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact, UsageError

PARTS = [field.name for field in fields(Lineage)]


@pytest.fixture
def parts() -> dict[str, Any]:
    """Return the parts of a quantization that belong together."""
    keys = np.ones((1, 2, 3, 4), np.float32)
    prefix = Prefix((1, 2, 3), keys, keys, "model")
    smoothing = Smoothing({Site("layers.0.mlp.down"): np.ones(4, np.float32)}, 0.5, "model")
    lineage = Lineage("model", prefix.digest, smoothing.digest, "text")
    scales = ActivationScales({Site("layers.0.mlp.down"): 0.5}, "max", lineage, 7)
    steps = np.full((1, 2), 0.1, np.float32)
    kv = KvScales(steps, steps, "per-head", "max", lineage, 7)
    return {"prefix": prefix, "scheme": QuantScheme(), "scales": scales, "smoothing": smoothing, "kv_scales": kv}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_differs_is_named(part: str) -> None:
    ours = Lineage(**dict.fromkeys(PARTS, "same"))
    other = replace(ours, **{part: "another"})
    assert ours.differences(vars(ours)) == ()
    (words,) = other.differences(vars(ours))
    assert part.replace("kv_", "cache ") in words
    with pytest.raises(UntrustedArtifact, match=f"^the plan was made of {re.escape(words)}$"):
        other.require("the plan was made of", "make it again", vars(ours), UntrustedArtifact)


def test_only_the_parts_that_are_asked_for_have_to_agree() -> None:
    Lineage("m", "p").require("the scales were made for", "make them again", {"model": "m"})


@pytest.mark.parametrize("part", PARTS)
def test_a_lineage_survives_a_file(part: str) -> None:
    lineage = Lineage("m", **({part: "d"} if part != "model" else {}))
    assert Lineage.from_json({**lineage.to_json(), "onnxruntime": "1.30"}) == lineage


def test_parts_that_belong_together_are_accepted_and_decide_the_digest(parts: dict[str, Any]) -> None:
    whole = Quantization(**parts)
    digests = {whole.digest, whole.float_twin.digest, replace(whole, kv_scales=None).digest}
    assert len(digests) == 3
    assert whole.float_twin.lineage == Lineage(
        "model", parts["prefix"].digest, parts["smoothing"].digest, scheme=parts["scheme"].digest
    )


@pytest.mark.parametrize("name", ["scales", "kv_scales"])
@pytest.mark.parametrize("part", ["model", "prefix", "smoothing", "text"])
def test_scales_of_something_else_are_refused(parts: dict[str, Any], name: str, part: str) -> None:
    made = parts[name]
    foreign = replace(made, lineage=replace(made.lineage, **{part: "0" * 64}))
    if (name, part) == ("scales", "text"):
        # The text itself is not at hand: only that both files were calibrated on the same one can be checked.
        words = "cache scales were calibrated under another text"
    else:
        words = f"scales were calibrated under another {part}"
    with pytest.raises(UsageError, match=words) as caught:
        Quantization(**{**parts, name: foreign})
    assert "cushion-deploy calibrate" in caught.value.hint


def test_a_smoothing_of_another_model_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smoothing was measured on another model"):
        Quantization(**{**parts, "smoothing": replace(parts["smoothing"], model_digest="other")})
