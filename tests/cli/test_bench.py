"""`bench` runs a bundle beside its float twin and says which is faster, whichever it is."""

from __future__ import annotations

from typing import Any

import pytest

from cushion_deploy.evaluate.speed import Comparison, Workload
from cushion_deploy.pipeline.benching import Bench

SMALL = ("--prompt", "16", "--decoded", "4", "--rounds", "2")


def test_a_bundle_beside_its_float_twin(cli: Any, planted_bundle: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--work-dir", planted_bundle.work, *SMALL, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert set(found["engines"]) == {"onnxruntime, INT8", "onnxruntime, float32"}
    for row in found["engines"].values():
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_milliseconds"]["p50"] <= row["decode_milliseconds"]["p99"]
        assert row["peak_memory_bytes"] > row["file_bytes"] > 0
    assert set(found["int8_against_float"]) == {"prefill", "decode"}
    assert "times as fast in prefill" in found["verdict"]


def test_without_the_twin_the_model_is_not_needed(cli: Any, planted_bundle: Any, tmp_path: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--no-float", "--model", tmp_path / "gone", *SMALL)
    assert done.code == 0, done.err
    assert "float32" not in done.out
    assert done.out.splitlines()[-1].startswith("Nothing to compare with")


def test_a_prompt_that_does_not_fit_is_bad_input(cli: Any, planted_bundle: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--no-float", "--prompt", "5000")
    assert done.code == 2
    assert "positions of the model" in done.err


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        (1.5, 2.0, "INT8 runs 1.50 times as fast in prefill and 2.00 times as fast in decode as floating point."),
        (0.9, 2.0, "INT8 is not faster in prefill here"),
        (1.01, 0.5, "INT8 is not faster in prefill and decode here"),
    ],
)
def test_the_verdict_is_plain(prefill: float, decode: float, words: str) -> None:
    assert Bench(Workload(), {}, {}, {}, Comparison(prefill, decode)).verdict.startswith(words)
