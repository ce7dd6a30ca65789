"""The ONNX Runtime session against transformers, and against itself in other pieces."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cushion_deploy.core.session import bfloat16_bits, context_limit, count_positions
from cushion_deploy.engines.onnxruntime.kernels import UINT8_WEIGHTS, exact_kernels
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.engines.onnxruntime.settings import CUDA, SessionSettings, session_options
from cushion_deploy.errors import MissingDependency, UntrustedArtifact, UsageError


def test_logits_equal_transformers_behind_the_prefix(tiny: Any, session: Any, ids: Any) -> None:
    expected = tiny.loaded.logits(ids, tiny.prefix)
    np.testing.assert_allclose(session.run(ids, need_logits="all"), expected, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 7, 39])
def test_chunked_prefill_equals_whole_prefill(tiny: Any, ids: Any, chunk: int) -> None:
    whole, pieces = tiny.session(chunk=128), tiny.session(chunk=chunk)
    np.testing.assert_allclose(
        pieces.run(ids, need_logits="all"), whole.run(ids, need_logits="all"), rtol=1e-4, atol=1e-4
    )
    assert pieces.length == whole.length == 40


def test_decode_step_by_step_equals_prefill(session: Any, ids: Any) -> None:
    whole = session.run(ids, need_logits="all")
    session.reset()
    steps = [session.run(ids[:, i : i + 1], need_logits="last") for i in range(ids.shape[1])]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_last_logits_are_the_last_row_of_all(tiny: Any, ids: Any) -> None:
    session = tiny.session(chunk=16)
    every = session.run(ids, need_logits="all")
    session.reset()
    last = session.run(ids, need_logits="last")
    assert last.shape == (1, 1, tiny.graph.contract.vocab_size)
    np.testing.assert_array_equal(last, every[:, -1:])


def test_tokens_fed_without_logits_count_as_context(session: Any, ids: Any) -> None:
    whole = session.run(ids, need_logits="last")
    session.reset()
    assert session.run(ids[:, :-1], need_logits="none") is None
    np.testing.assert_allclose(session.run(ids[:, -1:]), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", ["graph", "plain"])
@pytest.mark.parametrize("chunk", [4, 128])
def test_left_padded_batch_equals_single_rows(tiny: Any, ids: Any, graph: str, chunk: int) -> None:
    exported = getattr(tiny, graph)
    session: Any = open_session(exported, threads=1, chunk=chunk)
    rows = [ids[0, :12], ids[0, 20:25], ids[0, 30:39]]
    batch, mask = np.full((3, 12), 2), np.zeros((3, 12), dtype=np.int64)
    for i, row in enumerate(rows):
        batch[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    prefill = session.run(batch, mask, need_logits="last")
    grown = np.concatenate([mask, np.ones((3, 1), dtype=np.int64)], axis=1)
    decode = session.run(np.full((3, 1), 9), grown, need_logits="last")
    for i, row in enumerate(rows):
        session.reset()
        np.testing.assert_allclose(session.run(row[None])[0], prefill[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(session.run(np.array([[9]]))[0], decode[i], rtol=1e-4, atol=1e-4)


def test_positions_count_tokens_and_not_padding() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(count_positions(mask, 3), [[0, 1, 2], [2, 3, 4]])


def test_truncated_cache_equals_one_that_never_held_more(tiny: Any, session: Any, ids: Any) -> None:
    session.run(ids, need_logits="none")
    session.truncate(25)
    other = tiny.session()
    other.run(ids[:, :25], need_logits="none")
    assert session.length == other.length == 25
    np.testing.assert_allclose(session.run(ids[:, 30:31]), other.run(ids[:, 30:31]), rtol=1e-4, atol=1e-4)
    session.truncate(0)
    assert session.length == 0
    with pytest.raises(UsageError, match="cannot keep 3 tokens of a cache of 0"):
        session.truncate(3)


def test_reference_without_fusion_agrees(tiny: Any, session: Any, ids: Any) -> None:
    reference = tiny.session(fused=False)
    np.testing.assert_allclose(
        reference.run(ids, need_logits="all"), session.run(ids, need_logits="all"), rtol=1e-3, atol=1e-3
    )


def test_float16_cache_follows_the_contract(tiny: Any, tmp_path: Path, ids: Any) -> None:
    from cushion_deploy.core.graph_form import GraphForm
    from cushion_deploy.core.quantization import Quantization
    from cushion_deploy.core.schemes import QuantScheme
    from cushion_deploy.export.write import export_graph

    loaded = tiny.loaded
    quantization = Quantization(tiny.prefix, QuantScheme())
    form = GraphForm(dtype="float16", quantized=False)
    half = export_graph(loaded.spec, loaded.weights, quantization, form, tmp_path)
    session: Any = OnnxRuntimeSession(half.path, half.contract, SessionSettings(threads=1))
    expected = loaded.logits(ids, tiny.prefix)
    session.run(ids[:, :-1], need_logits="none")
    got = session.run(ids[:, -1:])
    assert got is not None
    assert got.dtype == np.float32
    assert np.abs(got[0, -1] - expected[0, -1]).max() < 0.05 * np.abs(expected[0, -1]).max()


def test_context_longer_than_the_positions_is_refused_before_it_runs(tiny: Any, session: Any) -> None:
    limit = context_limit(tiny.graph.contract)
    assert limit == 96 - 3
    session.run(np.full((1, limit), 9), need_logits="none")
    with pytest.raises(UsageError, match="94 tokens is longer than the 93"):
        session.run(np.array([[9]]))
    session.reset()
    with pytest.raises(UsageError, match="94 tokens"):
        session.run(np.full((1, limit + 1), 9))
    assert session.length == 0


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((1, 0), dtype=np.int64), None, "not empty"),
        (np.zeros(3, dtype=np.int64), None, r"\[3\]"),
        (np.zeros((1, 2), dtype=np.int32), None, "int32"),
        (np.array([[5, 9999]]), None, "token id 9999"),
        (np.array([[-1, 4]]), None, "token id -1"),
        (np.array([[5, 6]]), np.ones((1, 3), dtype=np.int64), r"attention mask is int64 \[1, 3\]"),
    ],
)
def test_input_that_does_not_fit_is_named(session: Any, ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.run(ids, mask)


def test_another_batch_size_needs_a_reset(session: Any) -> None:
    session.run(np.array([[5, 6]]))
    with pytest.raises(UsageError, match=r"batch of 2 rows, the cache has 1") as caught:
        session.run(np.array([[5], [6]]))
    assert "reset" in caught.value.hint


def test_failed_run_leaves_the_cache(tiny: Any, monkeypatch: pytest.MonkeyPatch, ids: Any) -> None:
    session = tiny.session(chunk=8)
    session.run(ids[:, :5], need_logits="none")
    step, calls = session._step, list[int]()

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(session, "_step", broken)
    with pytest.raises(KeyboardInterrupt):
        session.run(ids[:, 5:], need_logits="none")
    monkeypatch.undo()
    assert session.length == 5
    np.testing.assert_allclose(
        session.run(ids[:, 5:], need_logits="all"),
        tiny.loaded.logits(ids, tiny.prefix)[:, 5:],
        atol=2e-4,
    )


def test_missing_onnxruntime_carries_its_install_line(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as caught:
        tiny.session()
    assert caught.value.hint == "pip install 'cushion-deploy[cpu]'"


def test_a_missing_provider_is_an_error_with_its_install_command(tiny: Any) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(MissingDependency, match="has no CUDAExecutionProvider; it has") as caught:
        tiny.session(provider=CUDA)
    assert "pip install 'cushion-deploy[gpu]'" in caught.value.hint


def test_a_silent_fallback_to_the_cpu_is_an_error(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What onnxruntime-gpu does without a driver: it has the provider, and the session does not.
    real, asked = onnxruntime.InferenceSession, []

    def falls_back(path: Any, options: Any, providers: list[str]) -> Any:
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(MissingDependency, match="runs the graph on CPUExecutionProvider, asked for CUDA"):
        tiny.session(provider=CUDA)
    assert asked == [both]


def test_file_that_is_no_graph_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07not a graph")
    with pytest.raises(UntrustedArtifact, match="cannot be read as an ONNX graph"):
        OnnxRuntimeSession(tmp_path / "model.onnx", tiny.plain.contract)
    with pytest.raises(UsageError, match="does not exist"):
        OnnxRuntimeSession(tmp_path / "none.onnx", tiny.plain.contract)


@pytest.mark.parametrize("name", [b"position_ids", b"logits", b"batch"])
def test_a_graph_with_names_that_are_no_text_is_refused(tiny: Any, tmp_path: Path, name: bytes) -> None:
    folder = shutil.copytree(tiny.plain.path.parent, tmp_path / "graph")
    graph = folder / tiny.plain.path.name
    content = graph.read_bytes()
    assert name in content
    graph.write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(UntrustedArtifact, match="cannot load"):
        OnnxRuntimeSession(graph, tiny.plain.contract, SessionSettings(threads=1))


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"head_dim": 8}, {"vocab_size": 11}, {"dtype": "float16"}])
def test_contract_of_another_graph_is_refused(tiny: Any, change: dict[str, Any]) -> None:
    with pytest.raises(UntrustedArtifact, match="not the graph that its contract describes"):
        OnnxRuntimeSession(tiny.plain.path, replace(tiny.plain.contract, **change), SessionSettings(threads=1))


def test_every_session_flushes_subnormals_and_multiplies_exactly() -> None:
    options = session_options()
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert options.get_session_config_entry("session.x64quantprecision") == exact_kernels()[UINT8_WEIGHTS]


def test_integer_sums_do_not_saturate(tmp_path: Path) -> None:
    # Codes at the ends of their range: pairs of products exceed 16 bits, where kernels without VNNI saturate.
    rng = np.random.default_rng(0)
    activations = rng.choice([-127, 127, 126], (4, 64)).astype(np.float32)
    weights = rng.choice([-127, 127], (64, 8)).astype(np.int8)
    constants = {"x_scale": np.float32(1), "x_zero": np.int8(0), "w": weights}
    constants |= {"w_scale": np.ones(8, dtype=np.float32), "w_zero": np.zeros(8, dtype=np.int8)}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["dq"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["dw"], axis=1),
            helper.make_node("MatMul", ["dq", "dw"], ["y"]),
        ],
        "one linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "linear.onnx")
    options = session_options(SessionSettings(threads=1))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the saved file is valid only on this machine
    session = onnxruntime.InferenceSession(tmp_path / "linear.onnx", options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": activations})
    np.testing.assert_array_equal(got, activations.astype(np.int64) @ weights.astype(np.int64))
    assert "MatMulIntegerToFloat" in {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}


def test_head_runs_only_for_wanted_tokens(tiny: Any, tmp_path: Path, ids: Any) -> None:
    session: Any = tiny.session(chunk=16)
    profiled = session_options(SessionSettings(threads=1))
    profiled.enable_profiling = True
    profiled.profile_file_prefix = str(tmp_path / "profile")
    providers = ["CPUExecutionProvider"]
    session._session = onnxruntime.InferenceSession(tiny.graph.path, profiled, providers=providers)
    expected = tiny.loaded.logits(ids, tiny.prefix)
    np.testing.assert_allclose(session.run(ids, need_logits="last"), expected[:, -1:], atol=2e-4)
    session.reset()
    assert session.run(ids[:, :20], need_logits="none") is None
    np.testing.assert_allclose(session.run(ids[:, 20:], need_logits="all"), expected[:, 20:], atol=2e-4)
    events = json.loads(Path(session._session.end_profiling()).read_text())
    heads = [e["args"]["output_type_shape"][0]["float"][1] for e in events if e["name"].startswith("head/MatMul")]
    # Pieces of 16, 16, 8 with only the last token wanted; 16, 4 with none; 16, 4 with all.
    assert heads == [0, 0, 1, 0, 0, 16, 4]


def test_repetition_is_exact(session: Any, ids: Any) -> None:
    first = session.run(ids, need_logits="all")
    session.reset()
    np.testing.assert_array_equal(session.run(ids, need_logits="all"), first)


def test_bfloat16_bits_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4096) * 10.0 ** rng.integers(-30, 30, 4096)).astype(np.float32)
    x[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # two ties, one to each side
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16_bits(x), expected)
