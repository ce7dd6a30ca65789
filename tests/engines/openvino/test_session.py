"""The OpenVINO session against transformers, against ONNX Runtime, and against itself in other pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.onnxruntime.session import open_session as open_onnxruntime
from cushion_deploy.engines.openvino.model import compile_graph
from cushion_deploy.engines.openvino.session import OpenVinoSession, open_session
from cushion_deploy.errors import CheckFailed, UntrustedArtifact, UsageError
from cushion_deploy.export.write import export_graph


@pytest.fixture
def session(tiny: Any) -> OpenVinoSession:
    """Return a session of the tiny model behind its prefix, in the graph and in the cache."""
    return open_session(tiny.graph, threads=1)


def test_logits_equal_transformers_behind_the_prefix(tiny: Any, session: Any, ids: Any) -> None:
    expected = tiny.loaded.logits(ids, tiny.prefix)
    np.testing.assert_allclose(session.run(ids, need_logits="all"), expected, atol=2e-4)
    assert session.length == ids.shape[1]


@pytest.mark.parametrize("chunk", [1, 7, 39])
def test_chunks_and_single_tokens_equal_transformers(tiny: Any, ids: Any, chunk: int) -> None:
    session = open_session(tiny.graph, threads=1, chunk=chunk)
    expected = tiny.loaded.logits(ids, tiny.prefix)
    np.testing.assert_allclose(session.run(ids[:, :33], need_logits="all"), expected[:, :33], atol=2e-4)
    for i in range(33, 40):
        np.testing.assert_allclose(session.run(ids[:, i : i + 1]), expected[:, i : i + 1], atol=2e-4)


def test_only_the_wanted_logits_are_returned(tiny: Any, ids: Any) -> None:
    session = open_session(tiny.graph, threads=1, chunk=16)
    expected = tiny.loaded.logits(ids, tiny.prefix)
    assert session.run(ids[:, :20], need_logits="none") is None
    last = session.run(ids[:, 20:])
    assert last.shape == (1, 1, tiny.graph.contract.vocab_size)
    np.testing.assert_allclose(last, expected[:, -1:], atol=2e-4)


def test_head_runs_only_for_wanted_tokens(tiny: Any, ids: Any) -> None:
    session: Any = open_session(tiny.graph, threads=1, chunk=16)
    step, heads = session._step, []

    def counted(*arguments: Any) -> Any:
        found = step(*arguments)
        heads.append(session._request.get_output_tensor(0).shape[1])
        return found

    session._step = counted
    session.run(ids)
    session.run(ids[:, :20], need_logits="none")
    session.run(ids[:, :20], need_logits="all")
    assert heads == [0, 0, 1, 0, 0, 16, 4]


def test_left_padded_batch_equals_single_rows(tiny: Any, ids: Any) -> None:
    session: Any = open_session(tiny.graph, threads=1, chunk=4)
    rows = [ids[0, :12], ids[0, 20:25], ids[0, 30:39]]
    batch, mask = np.full((3, 12), 2), np.zeros((3, 12), dtype=np.int64)
    for i, row in enumerate(rows):
        batch[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    found = session.run(batch, mask)
    with pytest.raises(UsageError, match=r"batch of 1 rows, the cache has 3"):
        session.run(ids[:, :1])
    for i, row in enumerate(rows):
        expected = tiny.loaded.logits(row[None], tiny.prefix)
        np.testing.assert_allclose(found[i], expected[0, -1:], atol=2e-4)


def test_truncated_and_emptied_caches_equal_new_ones(tiny: Any, session: Any, ids: Any) -> None:
    expected = tiny.loaded.logits(ids, tiny.prefix)
    session.run(ids[:, ::-1].copy(), need_logits="none")
    session.reset()
    session.run(np.concatenate([ids[:, :25], ids[:, :9]], axis=1), need_logits="none")
    session.truncate(25)
    assert session.length == 25
    np.testing.assert_allclose(session.run(ids[:, 25:], need_logits="all"), expected[:, 25:], atol=2e-4)
    session.truncate(0)
    np.testing.assert_allclose(session.run(ids, need_logits="all"), expected, atol=2e-4)
    with pytest.raises(UsageError, match="cannot keep 41 tokens of a cache of 40"):
        session.truncate(41)


@pytest.mark.parametrize("held", [0, 5])
def test_a_failed_run_leaves_the_cache(tiny: Any, monkeypatch: pytest.MonkeyPatch, ids: Any, held: int) -> None:
    session = open_session(tiny.graph, threads=1, chunk=8)
    if held:
        session.run(ids[:, :held], need_logits="none")
    step, calls = session._step, list[int]()

    def broken(*args: Any) -> Any:
        calls.append(1)
        found = step(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(session, "_step", broken)
    with pytest.raises(KeyboardInterrupt):
        session.run(ids[:, held:], need_logits="none")
    monkeypatch.undo()
    assert session.length == held
    expected = tiny.loaded.logits(ids, tiny.prefix)[:, held:]
    np.testing.assert_allclose(session.run(ids[:, held:], need_logits="all"), expected, atol=2e-4)


def test_an_error_of_the_library_is_one_of_ours(tiny: Any, monkeypatch: pytest.MonkeyPatch, ids: Any) -> None:
    session = open_session(tiny.graph, threads=1)
    session.run(ids[:, :4], need_logits="none")

    class OutOfMemory:
        def infer(self, feed: Any) -> Any:
            raise RuntimeError("Exception from src/inference\nnot enough memory")

    monkeypatch.setattr(session, "_request", OutOfMemory())
    with pytest.raises(CheckFailed, match="could not run 3 tokens: not enough memory"):
        session.run(ids[:, 4:7])
    assert session.length == 4


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["int8", "float head", "float"])
def test_a_quantized_graph_has_the_logits_of_onnx_runtime(
    name: str, tiny_graphs: dict[str, ExportedGraph], ids: Any
) -> None:
    graph = tiny_graphs[name]
    ids = ids % graph.contract.vocab_size
    expected = open_onnxruntime(graph, threads=1).run(ids, need_logits="all")
    found = open_session(graph, threads=1).run(ids, need_logits="all")
    assert expected is not None
    assert found is not None
    # A code may fall on the other side of a tie, which is a few steps of a logit; the float graph has no codes.
    steps = 0.05 if graph.quantized else 1e-4
    assert np.abs(found - expected).max() <= steps * np.abs(expected).max()


@pytest.mark.parametrize("prefix", ["baked", "cache"])
def test_an_int8_cache_stays_codes(tiny: Any, ids: Any, tmp_path: Path, prefix: Any) -> None:
    spec, cached = tiny.loaded.spec, prefix == "cache"
    keys = np.full((spec.num_layers, spec.num_kv_heads), 0.05, np.float32)
    lineage = Lineage(spec.weights_digest, tiny.prefix.digest, text="c")
    kv = KvScales(keys, keys / 2, "per-head", "max", lineage, 1, with_prefix=cached)
    quantization = Quantization(tiny.prefix, QuantScheme(), kv_scales=kv)
    form = GraphForm(quantized=False, cache="int8", prefix=prefix)
    graph = export_graph(spec, tiny.loaded.weights, quantization, form, tmp_path)
    if cached:
        from cushion_deploy.core.artifacts import write_kv_scales, write_prefix
        from cushion_deploy.core.kv_scales import KV_SCALES_FILE
        from cushion_deploy.core.prefix import PREFIX_FILE

        write_prefix(tiny.prefix, tmp_path / PREFIX_FILE)
        write_kv_scales(kv, tmp_path / KV_SCALES_FILE)
    session: Any = open_session(graph, threads=1, chunk=7)
    expected = open_onnxruntime(graph, threads=1).run(ids, need_logits="all")
    np.testing.assert_allclose(session.run(ids, need_logits="all"), expected, atol=1e-3)
    assert {state.state.data.dtype for state in session._states} == {np.dtype(np.int8)}


def test_keys_and_values_do_not_leave_the_device(session: Any, ids: Any) -> None:
    session.run(ids)
    outputs = {name for port in session._request.model_outputs for name in port.names}
    assert outputs == {"logits"}
    assert {state.state.data.dtype for state in session._states} == {np.dtype(np.float32)}


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"head_dim": 8}, {"vocab_size": 11}, {"dtype": "float16"}])
def test_contract_of_another_graph_is_refused(tiny: Any, change: dict[str, Any]) -> None:
    graph = replace(tiny.plain, contract=replace(tiny.plain.contract, **change))
    with pytest.raises(UntrustedArtifact, match="not the graph that its contract describes"):
        open_session(graph, threads=1)


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"vocab_size": 11}])
def test_compiled_model_of_another_graph_is_refused(tiny: Any, change: dict[str, Any]) -> None:
    with pytest.raises(UntrustedArtifact, match="the compiled model is not that of the graph"):
        OpenVinoSession(compile_graph(tiny.plain, 1), replace(tiny.plain.contract, **change))


def test_file_that_is_no_graph_is_refused(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph = replace(tiny.plain, path=path)
    with pytest.raises(UsageError, match="does not exist"):
        open_session(graph)
    path.write_bytes(b"\x08\x07not a graph")
    with pytest.raises(UntrustedArtifact, match="cannot be read as an ONNX graph"):
        open_session(graph)
    with pytest.raises(UsageError, match="threads is 0"):
        open_session(tiny.plain, threads=0)


def test_floating_point_is_float32_on_every_processor(tiny: Any) -> None:
    compiled = compile_graph(tiny.plain, 1)
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f32"
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_without_the_library_the_hint_is_the_install_command(python: Callable[..., str]) -> None:
    code = """
import sys
sys.modules["openvino"] = None
from cushion_deploy.engines.openvino.library import import_openvino
from cushion_deploy.errors import MissingDependency
try:
    import_openvino()
except MissingDependency as e:
    print(e.hint, "openvino_telemetry" in sys.modules)
"""
    assert python(code) == "pip install 'cushion-deploy[openvino]' False"


def test_an_output_has_the_name_of_the_graph_even_if_openvino_adds_another(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from cushion_deploy.engines.openvino.library import core
    from cushion_deploy.engines.openvino.model import name_of

    values = {"w": np.ones((4, 3), np.float32), "flat": np.array([-1, 4]), "back": np.array([1, -1, 3])}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "flat"], ["rows"], "head/Reshape_1"),
            helper.make_node("Gemm", ["rows", "w"], ["head/Gemm_2"], "head/Gemm_2"),
            helper.make_node("Reshape", ["head/Gemm_2", "back"], ["logits"], "head/Reshape_3"),
        ],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "sequence", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "sequence", 3])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "g.onnx")
    compiled = core().compile_model(core().read_model(tmp_path / "g.onnx"), "CPU")
    assert "head/Gemm_2" in compiled.outputs[0].names
    assert name_of(compiled.outputs[0]) == "logits"
