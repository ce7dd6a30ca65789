"""Every rung passes on an intact subject, and fails when its subject is broken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.sites import Site
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from cushion_deploy.engines.onnxruntime.settings import SessionSettings
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.compare import CodeDistance
from cushion_deploy.parity.ladder import (
    decode_rung,
    engine_rung,
    float_rung,
    greedy_tokens,
    plan_rung,
    segment_decode_rung,
    segment_rung,
)
from cushion_deploy.parity.reference import float_inputs
from cushion_deploy.parity.segment_checks import first_diverging
from cushion_deploy.parity.segments import SegmentRun

STEPS = 12


def passed(checks: list[ParityCheck]) -> list[bool]:
    return [check.passed for check in checks]


def open_session(graph: Any, kind: type[OnnxRuntimeSession] = OnnxRuntimeSession, **options: Any) -> OnnxRuntimeSession:
    return kind(graph.path, graph.contract, SessionSettings(threads=1, **options))


class ForgetsPositions(OnnxRuntimeSession):
    """Counts positions from 0 in every call."""

    def run(self, ids: Any, mask: Any = None, positions: Any = None, *, need_logits: Any = "last") -> Any:
        counted = np.arange(ids.shape[1], dtype=np.int64)[None].repeat(ids.shape[0], 0)
        return super().run(ids, mask, counted, need_logits=need_logits)


class LosesAToken(OnnxRuntimeSession):
    """Drops the newest token of the cache before every call."""

    def run(self, ids: Any, mask: Any = None, positions: Any = None, *, need_logits: Any = "last") -> Any:
        self.truncate(max(0, self.length - 1))
        return super().run(ids, mask, positions, need_logits=need_logits)


def site_inputs(d: Any) -> Callable[[], Any]:
    """Return what the float rung asks when it fails."""
    return lambda: float_inputs(d.model, d.prefix, d.reference.ids)


def test_the_float_rung_holds_and_then_asks_for_no_site(deployed) -> None:
    def never() -> Any:
        raise AssertionError("the inputs of the Sites cost another run of the model")

    checks = float_rung(deployed.reference, deployed.twin, never)
    assert [c.site for c in checks] == [None, None]
    assert passed(checks) == [True, True]
    assert [c.metric for c in checks] == ["max |logit difference|", "top-1 agreement"]
    assert checks[0].value <= 1e-4
    assert {c.rung for c in checks} == {"float graph against transformers"}


FLOAT_FAULTS = {
    "model.embed_tokens.weight": "layers.0.attn.qkv",
    "model.layers.0.input_layernorm.weight": "layers.0.attn.qkv",
    "layers.0.attn.qkv.weight": "layers.0.attn.out",
    "prefix.0.key": "layers.0.attn.out",
    "prefix.2.value": "layers.2.attn.out",
    "layers.1.attn.out.weight": "layers.1.mlp.gate_up",
    "layers.1.mlp.gate_up.weight": "layers.1.mlp.down",
    "layers.1.mlp.down.weight": "layers.2.attn.qkv",
    "layers.2.mlp.down.weight": "head",
    "model.norm.weight": "head",
}


@pytest.mark.parametrize(("name", "site"), FLOAT_FAULTS.items())
def test_the_float_rung_names_the_first_site_behind_another_tensor(name: str, site: str, deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][..., : tensors[name].shape[-1] // 2] *= np.float32(1.3)  # a half: a norm undoes a common factor

    checks = float_rung(deployed.reference, sabotaged(deployed.twin, edit), site_inputs(deployed))
    assert not checks[0].passed
    assert {c.site for c in checks if not c.passed} == {site}
    assert checks[0].note.startswith(f"first diverging Site: {site}; max ")


def test_the_float_rung_says_that_the_head_itself_differs(deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["head.weight"][:, 3] += np.float32(0.5)

    checks = float_rung(deployed.reference, sabotaged(deployed.twin, edit), site_inputs(deployed))
    assert (checks[0].passed, checks[0].site) == (False, "head")
    assert checks[0].note.startswith("the difference arises after the input of the last Site, head; max ")


def test_the_float_rung_fails_on_nan(deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][0] = np.nan

    checks = float_rung(deployed.reference, sabotaged(deployed.twin, edit), site_inputs(deployed))
    assert [c.site for c in checks] == ["head", "head"], "the norm stands before the head"
    assert all(math.isnan(c.value) for c in checks)
    assert passed(checks) == [False, False]


@pytest.mark.parametrize("kernels", ["literal", "fused"])
def test_the_segment_rung_holds(kernels: str, deployed) -> None:
    checks = segment_rung("segments", deployed.reference, SegmentRun(deployed.graph, deployed.scales, kernels))
    assert passed(checks) == [True, True, True]
    assert [c.site for c in checks] == [None, None, None]
    assert {c.rung for c in checks} == {"segments"}
    assert f"mean over {len(deployed.graph.sites)} Sites" in checks[0].note


@pytest.mark.parametrize("kernels", ["literal", "fused"])
def test_the_segment_decode_rung_holds(kernels: str, deployed) -> None:
    run = SegmentRun(deployed.graph, deployed.scales, kernels)
    assert passed(segment_decode_rung("decode", deployed.reference, run, STEPS)) == [True, True, True]


def test_the_segment_decode_rung_sees_a_damaged_cache(deployed) -> None:
    run = SegmentRun(deployed.graph, deployed.scales, "fused")

    class Damaged:
        graph, room = run.graph, None

        def __call__(self, ids: Any, codes: Any, past: Any = None) -> Any:
            if past is not None:
                past = {**past, "past_key_values.1.value": past["past_key_values.1.value"] * np.float32(0.9)}
            return run(ids, codes, past)

    checks = segment_decode_rung("decode", deployed.reference, Damaged(), STEPS)  # type: ignore[arg-type]
    assert not passed(checks)[0]
    assert checks[0].site == "layers.1.attn.out"


@pytest.mark.parametrize("chunk", [7, 128])
def test_the_decode_rung_holds(chunk: int, deployed) -> None:
    session = open_session(deployed.twin, chunk=chunk)
    checks = decode_rung("decode", deployed.reference, session, STEPS)
    assert passed(checks) == [True]
    assert checks[0].value <= 1e-4


@pytest.mark.parametrize("kind", [ForgetsPositions, LosesAToken])
def test_the_decode_rung_sees_a_broken_cache(kind: type[OnnxRuntimeSession], deployed) -> None:
    checks = decode_rung("decode", deployed.reference, open_session(deployed.twin, kind), STEPS)
    assert passed(checks) == [False]


def test_the_engine_rung_holds_and_tells_the_perplexity(deployed) -> None:
    session = open_session(deployed.graph)
    seen: list[tuple[str, int, int]] = []
    checks, score = engine_rung(
        "engine", deployed.reference, session, lambda task, done, total, note="": seen.append((task, done, total))
    )
    assert passed(checks) == [True]
    assert seen[:4] == [("engine: perplexity", i, 4) for i in (1, 2, 3, 4)]
    assert seen[-1] == ("engine: continuation", 32, 32)
    losses = []
    for window in deployed.reference.windows:
        session.reset()
        logits = session.run(window[None], need_logits="all")
        losses.append(
            torch.nn.functional.cross_entropy(torch.tensor(logits[0, :-1]), torch.tensor(window[1:]), reduction="mean")
        )
    assert score.perplexity == pytest.approx(math.exp(float(torch.stack(losses).mean())), rel=1e-4)
    assert score.losses.shape == (4, len(deployed.reference.windows[0]) - 1)
    assert "on 252 tokens" in checks[0].note
    assert "of 32 tokens" in checks[0].note


@pytest.mark.parametrize("name", ["head.weight_scales", "model.norm.weight"])
def test_the_engine_rung_sees_another_perplexity(name: str, deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = (tensors[name] * np.float32(3)).astype(np.float32)

    checks, _ = engine_rung("engine", deployed.reference, open_session(sabotaged(deployed.graph, edit)))
    assert passed(checks) == [False]


SEGMENTS = ParityCheck("kernels", "identical INT8 codes, lowest Site", 1.0, 0.999, "at least")


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("layers.1.mlp.down", "on rung 'kernels', first diverging Site: layers.1.mlp.down; "),
        (None, "on rung 'kernels', no segment diverges; "),
    ],
)
def test_the_engine_rung_points_to_the_segments(site: Any, words: str, deployed) -> None:
    segments = [dataclasses.replace(SEGMENTS, site=site)]
    worse = dataclasses.replace(deployed.reference, quantized_nll=deployed.reference.quantized_nll + 1)
    (failed,), _ = engine_rung("engine", worse, open_session(deployed.graph), segments=segments)
    assert (failed.site, failed.note.startswith(words)) == (site, True), failed.note
    (held,), _ = engine_rung("engine", deployed.reference, open_session(deployed.graph), segments=segments)
    assert held.site is None
    assert "kernels" not in held.note


def run_half(d: Any, half: Any) -> list[ParityCheck]:
    runs = (SegmentRun(graph, d.scales, "literal") for graph in (d.graph, half))
    return plan_rung("half", d.reference, *runs)


def test_the_half_rung_holds_and_sees_the_rounding(deployed) -> None:
    checks = run_half(deployed, deployed.half)
    assert passed(checks) == [True, True, True]
    assert [c.site for c in checks] == [None, None, None]
    assert checks[0].value < 0.999, "float16 flips codes that lie near a tie"
    # The head computes in float32 from equal codes: what is left is one rounding of the logits to 11 bits.
    largest = np.abs(deployed.reference.quantized_logits).max()
    rounded = deployed.reference.quantized_logits.astype(np.float16).astype(np.float32)
    expected = np.abs(rounded - deployed.reference.quantized_logits).max() / largest
    assert checks[2].value == pytest.approx(expected, rel=0.05)


def test_the_bfloat16_rung_sees_its_rounding_and_no_more(deployed) -> None:
    checks = run_half(deployed, deployed.brain)
    assert passed(checks) == [True, True, True]
    half = run_half(deployed, deployed.half)
    assert checks[0].value < half[0].value
    # One rounding of the logits to 8 bits: torch rounds them to the same values.
    logits = torch.from_numpy(deployed.reference.quantized_logits)
    expected = float((logits.bfloat16().float() - logits).abs().max() / logits.abs().max())
    assert checks[2].value == pytest.approx(expected, rel=0.05)


BEHIND = {
    "layers.1.attn.out.scale": "layers.1.mlp.gate_up",
    "layers.0.attn.qkv.weight_scales": "layers.0.attn.out",
    "model.layers.1.post_attention_layernorm.weight": "layers.1.mlp.gate_up",
    "prefix.2.value": "layers.2.attn.out",
    "head.weight_scales": "head",
}
"""Tensors, and the first Site behind each."""


@pytest.mark.parametrize(
    ("kind", "factor", "name", "site"),
    [
        *(("half", 1.3, name, site) for name, site in BEHIND.items()),
        # A coarser grid drowns in the rounding of bfloat16; the rung of written scales sees it bit by bit.
        *(("brain", 2.0, name, site) for name, site in BEHIND.items() if not name.endswith(".out.scale")),
    ],
)
def test_the_plan_rung_names_the_first_site_behind_another_tensor(
    name: str, site: str, kind: str, factor: float, deployed, sabotaged
) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = (tensors[name] * np.float32(factor)).astype(tensors[name].dtype)

    checks = run_half(deployed, sabotaged(getattr(deployed, kind), edit))
    assert {c.site for c in checks if not c.passed} == {site}


def test_the_engine_rung_sees_better_perplexity_too(deployed) -> None:
    worse = dataclasses.replace(deployed.reference, quantized_nll=deployed.reference.quantized_nll + 1)
    checks, _ = engine_rung("engine", worse, open_session(deployed.graph))
    assert passed(checks) == [False]
    assert checks[0].value > 0.5


def test_greedy_tokens_are_those_of_transformers(deployed) -> None:
    prompt, prefix = deployed.reference.prompt, deployed.prefix.token_ids
    whole = torch.tensor([[*prefix, *prompt[0].tolist()]])
    for _ in range(10):
        with torch.inference_mode():
            logits = deployed.model.module(input_ids=whole, use_cache=False).logits
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
    assert greedy_tokens(open_session(deployed.twin), prompt, 10) == whole[0, -10:].tolist()


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([(1.0, 0), (1.0, 0), (1.0, 0)], None),
        ([(0.999, 1), (0.9989, 1), (0.1, 90)], "b"),
        ([(0.9995, 2), (0.5, 1), (1.0, 0)], "a"),
        ([(1.0, 0), (1.0, 1), (0.99, 1)], "c"),
    ],
)
def test_the_first_site_beyond_a_limit_is_named(distances: list[tuple[float, int]], expected: str | None) -> None:
    named = {Site(name): CodeDistance(*d) for name, d in zip("abc", distances, strict=True)}
    assert first_diverging(named) == expected
