"""`bench` runs a bundle beside its float twin and says which is faster, whichever it is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cushion_deploy.engines.onnxruntime.kernels import UINT8_WEIGHTS, WAYS
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import session_config
from cushion_deploy.engines.probe import probe
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.speed import Comparison, Workload
from cushion_deploy.runtime.bundle import open_bundle
from cushion_deploy.verbs import bench as benching
from cushion_deploy.verbs.bench import Bench

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
    assert set(found["int8_against_float"]["onnxruntime"]) == {"prefill", "decode"}
    assert "times as fast in prefill" in found["verdicts"][0]
    assert found["kernels"].startswith(WAYS[session_config()[UINT8_WEIGHTS]])


def test_without_the_twin_the_model_is_not_needed(cli: Any, planted_bundle: Any, tmp_path: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--no-float", "--model", tmp_path / "gone", *SMALL)
    assert done.code == 0, done.err
    assert "float32" not in done.out
    assert done.out.splitlines()[-1].startswith("Nothing to compare with")


def test_a_prompt_that_does_not_fit_is_bad_input(cli: Any, planted_bundle: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--no-float", "--prompt", "5000")
    assert done.code == 2
    assert "positions of the model" in done.err


def test_a_batch_beyond_the_memory_is_bad_input(cli: Any, planted_bundle: Any) -> None:
    done = cli("bench", planted_bundle.bundle, "--no-float", "--batch", 10**9, "--prompt", 96, "--decoded", 4)
    contract = open_bundle(planted_bundle.bundle).contract
    # Keys and values, in four bytes each: 10^9 sequences of 100 tokens are 10^11 positions.
    terabytes = 2 * 4 * contract.num_layers * contract.num_kv_heads * contract.head_dim * 1e11 / 1e12
    assert terabytes > 1
    assert done.code == 2
    assert f"of 1,000,000,000 sequences of 100 tokens take {terabytes:.1f} TB" in done.err
    assert "--batch" in done.err


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        (1.5, 2.0, "On x, INT8 runs 1.50 times as fast in prefill and 2.00 times as fast in decode as floating point."),
        (0.9, 2.0, "On x, INT8 is not faster in prefill: it runs"),
        (1.01, 0.5, "On x, INT8 is not faster in prefill and decode: it runs"),
    ],
)
def test_the_verdict_is_plain(prefill: float, decode: float, words: str) -> None:
    (verdict,) = Bench(Workload(), {}, {}, {}, {"x": Comparison(prefill, decode)}).verdicts
    assert verdict.startswith(words)


def test_a_plan_runs_beside_its_own_float_twin_or_says_why_not(
    cli: Any, planted_bundle: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle, work = tmp_path / "b", ("--work-dir", planted_bundle.work)
    plan = ("--engine", "tensorrt-rtx", "--target", "sm86", "--max-context", 64, "--output", bundle)
    assert cli("engine", planted_bundle.bundle, *plan, *work).code == 0
    here = cli("bench", bundle, *work, *SMALL, "--json").json
    if not probe("tensorrt_rtx").gpus:
        assert here["not_run"]["tensorrt-rtx"].startswith("not run: ")

    # Where there is a device: stand-ins that compute with ONNX Runtime, the float plan really compiled.
    opened = []

    def stand_in(engine: TensorRt, graph: Any, plan: bytes) -> Any:
        opened.append((engine.name, len(plan) > 1000, graph.contract.dtype, graph.quantized))
        return open_session(graph, threads=1)

    def int8(bundle: Any, engine: str, threads: Any) -> Any:
        session = open_session(bundle.graph, threads=1)
        half = replace(session.contract, dtype="float16")
        calls = {"run": session.run, "reset": session.reset, "close": session.close}
        return SimpleNamespace(contract=half, device_bytes=12345, **calls)

    monkeypatch.setattr(benching, "open_engine", int8)
    monkeypatch.setattr(TensorRt, "open", stand_in)
    done = cli("bench", bundle, *work, *SMALL, "--json")
    assert done.code == 0, done.err
    assert opened == [("tensorrt-rtx", True, "float16", False)]
    found = done.json
    assert {"tensorrt-rtx, INT8", "tensorrt-rtx, float16"} <= set(found["engines"])
    assert set(found["int8_against_float"]) == {"onnxruntime", "tensorrt-rtx"}
    assert found["engines"]["tensorrt-rtx, INT8"]["peak_memory_bytes"] == 12345
    assert found["not_run"] == {}
    assert "tensorrt-rtx, float16" in cli("bench", bundle, *work, *SMALL).out

    # A plan that cannot run the workload is reported and closed; everything else is still timed.
    closed: list[str] = []

    def refuses(engine: TensorRt, graph: Any, plan: bytes) -> Any:
        def run(*_: Any, **__: Any) -> Any:
            raise UsageError("fits no profile", hint="compile it larger")

        return SimpleNamespace(contract=graph.contract, run=run, close=lambda: closed.append(engine.name))

    monkeypatch.setattr(TensorRt, "open", refuses)
    found = cli("bench", bundle, *work, *SMALL, "--json").json
    assert found["not_run"] == {"tensorrt-rtx": "not run: fits no profile"}
    assert set(found["engines"]) == {"onnxruntime, INT8", "onnxruntime, float32"}
    assert closed == ["tensorrt-rtx"]
