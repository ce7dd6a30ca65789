"""TensorRT-RTX: real builds of a tiny decoder without a GPU, and every way in which a build can end."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.probe import Probe, child_environment
from cushion_deploy.engines.tensorrt import compile as tensorrt
from cushion_deploy.engines.tensorrt.compile import TensorRt, compatibility_key, why_not_run
from cushion_deploy.engines.tensorrt.coverage import graph_linears
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD, Flavour
from cushion_deploy.engines.tensorrt.profiles import Limits, profiles
from cushion_deploy.engines.tensorrt.worker import run_worker
from cushion_deploy.errors import CheckFailed, MissingDependency, UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.families import get_family

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 2, 4, 2, 16, 64, 128, 256
LIMITS = CompileOptions(max_context=64, max_prefill=16, targets=("sm86",))
SPEC = ModelSpec(
    family="llama",
    source="tiny",
    weights_digest="d" * 64,
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_positions=128,
    norm_eps=1e-5,
    activation="silu",
    rotary=RotaryScaling(10000.0),
    tied_head=True,
    parameters=0,
    bos_token_id=None,
    eos_token_ids=(),
    attention_scale=0.25,
)


class RandomWeights:
    """The tensors of a tiny llama, random and deterministic."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        kv = KV_HEADS * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
        for i in range(LAYERS):
            layer = {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        self._tensors = {
            f"{name}.weight": rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()
        }

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self._tensors[name][start:stop]


def export(folder: Path, *, quantize_head: bool = True, dtype: Any = "float16", **form: Any) -> ExportedGraph:
    """Export the tiny decoder with a prefix of two positions."""
    rng = np.random.default_rng(1)
    shape = (LAYERS, KV_HEADS, 2, HEAD_DIM)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    prefix = Prefix((1, 2), keys, values, SPEC.weights_digest)
    scheme = QuantScheme(quantize_head=quantize_head)
    sites = get_family("llama").linears(SPEC, head=quantize_head)
    scales = ActivationScales(
        dict.fromkeys(sites, 0.02), "max", Lineage(SPEC.weights_digest, prefix.digest, text="c"), tokens=1
    )
    quantization = Quantization(prefix, scheme, scales)
    return export_graph(SPEC, RandomWeights(), quantization, GraphForm(dtype=dtype, **form), folder)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the exported tiny decoder."""
    return export(tmp_path_factory.mktemp("graph"))


@pytest.fixture
def rtx() -> TensorRt:
    """Return the engine where its library is installed."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is an optional extra: pip install 'cushion-deploy[rtx]'")
    return TensorRt(RTX)


def edited(graph: ExportedGraph, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> ExportedGraph:
    """Return a copy of a graph on disk after an edit of its nodes and small tensors."""
    model = onnx.load(graph.path)
    edit(model)
    path = folder / "edited.onnx"
    onnx.save(model, path, save_as_external_data=True, location="edited.onnx.data")
    return dataclasses.replace(graph, path=path)


def replace_tensor(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Replace an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def scale_the_contracting_axis(model: onnx.ModelProto) -> None:
    """Move the weight scale of one linear from its output to its input channels: valid ONNX, no INT8."""
    for node in model.graph.node:
        if "layers.1.mlp.gate_up.weight_codes" in node.input:
            next(a for a in node.attribute if a.name == "axis").i = 0
    replace_tensor(model, "layers.1.mlp.gate_up.weight_scales", np.full(HIDDEN, 0.01, np.float32))
    replace_tensor(model, "layers.1.mlp.gate_up.weight_zero_points", np.zeros(HIDDEN, np.int8))


def test_a_plan_holds_every_linear_in_int8_and_fused_attention(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    options = dataclasses.replace(LIMITS, targets=(), max_batch=2)
    artifact = rtx.compile(graph, tmp_path, options)
    name = "sm80+sm86+sm89+sm120.engine"
    assert sorted(os.listdir(tmp_path)) == ["engine.json", name]
    assert artifact.files == (name, "engine.json")
    assert (tmp_path / name).stat().st_size == artifact.details["plan_bytes"] > 1_000_000
    assert artifact.targets == RTX.default_targets
    # Per layer q, k, v, o, gate, up, down in four packed products; and the head.
    assert (artifact.linears, artifact.int8_linears) == (7 * LAYERS + 1, 7 * LAYERS + 1)
    assert artifact.details["int8_gemms"] == [4 * LAYERS + 1] * 2
    assert artifact.fused_attention == LAYERS
    assert artifact.details["attention_matmuls"] == 2 * LAYERS
    assert artifact.details["unknown_gemms"] == artifact.details["float_linears"] == []
    assert artifact.details["peak_rss_bytes"] > artifact.details["plan_bytes"]
    assert not artifact.ran
    assert artifact.details["not_run"].startswith("not run: ")
    read = EngineArtifact.from_json(json.loads((tmp_path / "engine.json").read_text()))
    assert read.to_json() == json.loads(json.dumps(artifact.to_json())) | {
        "targets": artifact.targets,
        "files": artifact.files,
    }


def test_a_head_left_in_floating_point_is_named_and_not_missed(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", quantize_head=False), tmp_path / "engine", LIMITS)
    assert (artifact.linears, artifact.int8_linears) == (7 * LAYERS, 7 * LAYERS)
    assert len(artifact.details["linears_without_site"]) == 1
    assert artifact.details["linears_without_site"][0].startswith("head/")


def test_a_linear_that_silently_lost_int8_fails_the_build_unless_permitted(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    broken = edited(graph, tmp_path, scale_the_contracting_axis)
    folder = tmp_path / "engine"
    folder.mkdir()
    with pytest.raises(CheckFailed, match=r"13 of 15 linears .*layers\.1\.mlp\.gate_up.*contracting axis 0") as caught:
        rtx.compile(broken, folder, LIMITS)
    assert "--allow-float-linears 2" in caught.value.hint
    assert list(folder.iterdir()) == []
    artifact = rtx.compile(broken, folder, dataclasses.replace(LIMITS, allow_float_linears=2))
    assert (artifact.linears, artifact.int8_linears) == (15, 13)
    assert artifact.details["float_linears"] == ["layers.1.mlp.gate_up"]
    assert {fallback["reason"].partition(":")[0] for fallback in artifact.details["fallbacks"]} == {"weight-scales"}


def test_errors_of_the_parser_name_the_node(rtx: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    def shift(model: onnx.ModelProto) -> None:
        replace_tensor(model, "zero_point", np.array(3, np.int8))

    broken = edited(graph, tmp_path, shift)
    with pytest.raises(CheckFailed, match=r"layers\.0\.attn/.*Q.*zero.?point") as caught:
        rtx.compile(broken, tmp_path, LIMITS)
    assert "cannot read the graph" in caught.value.message
    assert not list(tmp_path.glob("*.engine"))


def test_a_disk_without_room_for_the_plan_is_a_usage_error(rtx: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UsageError, match="cannot write"):
            rtx.compile(graph, tmp_path, LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_importing_the_engine_imports_neither_the_library_nor_onnx() -> None:
    code = (
        "import sys, cushion_deploy.engines.tensorrt.compile; print([m for m in sys.modules if m in ('tensorrt_rtx', "
        "'tensorrt', 'onnx', 'onnx_ir', 'torch', 'cushion_deploy.families')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_library_the_install_line_is_told(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "probe", lambda module: Probe(module, problem=f"No module named '{module}'"))
    with pytest.raises(MissingDependency) as caught:
        TensorRt(RTX).compile(graph, tmp_path, LIMITS)
    assert caught.value.hint == "pip install 'cushion-deploy[rtx]'"


@pytest.mark.parametrize(("name", "words"), [("sm87", "unknown target 'sm87'"), ("sm75", "Turing")])
def test_a_target_that_cannot_be_built_lists_the_valid_ones(
    name: str, words: str, graph: ExportedGraph, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        TensorRt(RTX).compile(graph, tmp_path, dataclasses.replace(LIMITS, targets=("sm86", name)))
    assert "sm80, sm86, sm89, sm120, sm121" in caught.value.hint


def test_targets_are_ordered_and_told_once() -> None:
    assert RTX.choose_targets(["SM121", "sm86", "sm80", "sm86"], ()) == ("sm80", "sm86", "sm121")
    assert RTX.choose_targets([], ()) == RTX.default_targets


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that puts a shell script in the place of the worker; it returns the scratch folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def write(script: str) -> Path:
        file = tmp_path / "worker.sh"
        file.write_text(f"#!/bin/sh\ncd '{scratch}'\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(file))
        return scratch

    return write


def test_a_crash_of_the_library_is_an_error_with_its_last_log_lines(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in('for i in $(seq 1 40); do echo "INFO: step $i." >&2; done; kill -SEGV $$')
    with pytest.raises(CheckFailed, match="SIGSEGV") as caught:
        run_worker(RTX, {}, scratch)
    assert "INFO: step 40." in caught.value.message
    assert "INFO: step 9." not in caught.value.message


def test_a_worker_that_ends_without_an_outcome_is_an_error(stand_in: Callable[[str], Path]) -> None:
    with pytest.raises(CheckFailed, match="exit code 0"):
        run_worker(RTX, {}, stand_in("exit 0"))


def test_a_full_disk_in_the_worker_is_raised_here(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in(f'echo \'{{"os_error": [{errno.ENOSPC}, "No space left on device"]}}\' > outcome.json')
    with pytest.raises(OSError, match="No space left") as caught:
        run_worker(RTX, {}, scratch)
    assert caught.value.errno == errno.ENOSPC


def test_an_interrupt_kills_the_worker_at_once(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in("read request; echo $$ > pid; kill -USR1 $PPID; exec sleep 60")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_worker(RTX, {}, scratch)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(int((scratch / "pid").read_text()), 0)


def test_the_worker_leaves_when_its_parent_is_gone() -> None:
    code = (
        "import threading, time\n"
        "from cushion_deploy.engines.tensorrt_worker import _leave_with_parent\n"
        "threading.Thread(target=_leave_with_parent, daemon=True).start()\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=child_environment())
    try:
        child.communicate(timeout=30)
        assert child.returncode == 1
    finally:
        child.kill()
        child.wait()


def test_a_site_without_exactly_one_product_is_refused() -> None:
    sites = {Site("layers.0.attn.qkv"): 3, Site("layers.0.mlp.down"): 1}
    first = {"node": "a", "weight": "layers.0.attn.qkv.weight_codes", "broken": ""}
    second = {"node": "b", "weight": "layers.0.mlp.down.weight", "broken": ""}
    embedding = {"node": "c", "weight": "model.embed_tokens.weight", "broken": ""}
    found = graph_linears([first, second, embedding], sites)
    assert [(x.node, x.site, x.linears) for x in found] == [
        ("a", "layers.0.attn.qkv", 3),
        ("b", "layers.0.mlp.down", 1),
    ]
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.down: none"):
        graph_linears([first], sites)
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.down: b, d"):
        graph_linears([first, second, {**second, "node": "d"}], sites)


def test_the_key_changes_with_everything_that_decides_about_a_plan(graph: ExportedGraph) -> None:
    def key(
        flavour: Flavour = RTX,
        of: ExportedGraph = graph,
        version: str = "1.7.1.116",
        targets: tuple[str, ...] = ("sm86",),
        options: CompileOptions = LIMITS,
    ) -> str:
        shapes = profiles(of.contract, Limits.of(options, of.contract))
        return compatibility_key(flavour, of, version, targets, shapes, options)

    keys = [
        key(),
        key(of=dataclasses.replace(graph, digest="0" * 64)),
        key(flavour=STANDARD),
        key(version="1.7.2"),
        key(targets=("sm86", "sm89")),
        key(options=dataclasses.replace(LIMITS, max_context=65)),
        key(options=dataclasses.replace(LIMITS, allow_float_linears=1)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_why_a_plan_was_not_run_follows_from_the_devices() -> None:
    assert why_not_run([], ["sm86"]) == "not run: no NVIDIA GPU on this machine"
    assert "sm75 NVIDIA T4 is none of the targets sm86" in why_not_run(["sm75 NVIDIA T4"], ["sm86"])
    assert "executes nothing" in why_not_run(["sm86 NVIDIA GeForce RTX 3090"], ["sm86"])


@pytest.mark.parametrize(("dtype", "fused"), [("bfloat16", LAYERS), ("float32", 0)])
def test_plans_of_other_types_run_every_linear_in_int8(rtx: TensorRt, dtype: Any, fused: int, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", dtype=dtype), tmp_path / "engine", LIMITS)
    assert artifact.int8_linears == 7 * LAYERS + 1
    # FP32 graphs have no fused attention.
    assert (artifact.fused_attention, artifact.details["dtype"]) == (fused, dtype)
    assert artifact.details["half_accumulators"] == []
    assert artifact.details["linears_without_site"] == []


def test_the_command_of_the_vendors_tool_is_kept_with_the_plan(
    rtx: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    words = shlex.split(rtx.compile(graph, tmp_path, LIMITS).details["command"])
    assert words[:3] == ["tensorrt_rtx", "--onnx=model.onnx", "--saveEngine=sm86.engine"]
    largest = next(word for word in reversed(words) if word.startswith("--maxShapes="))
    assert "past_key_values.1.value:1x2x63x16" in largest.split(",")


def per_channel_activation(model: onnx.ModelProto) -> None:
    """Scale an activation per channel: valid ONNX, no INT8."""
    name = "layers.1.mlp.gate_up"
    for node in model.graph.node:
        if f"{name}.scale" in node.input:
            node.input[1], node.input[2] = f"{name}.many", f"{name}.zeros"
            node.attribute.append(onnx.helper.make_attribute("axis", 2))
    model.graph.initializer.append(numpy_helper.from_array(np.full(HIDDEN, 0.02, np.float32), f"{name}.many"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(HIDDEN, np.int8), f"{name}.zeros"))


def float_weight(model: onnx.ModelProto) -> None:
    """Leave a weight in floating point behind a quantized activation: valid ONNX, no INT8."""
    name = "layers.1.mlp.gate_up"
    dq = next(n for n in model.graph.node if f"{name}.weight_codes" in n.input)
    product = next(n for n in model.graph.node if dq.output[0] in n.input)
    product.input[1] = f"{name}.weight"
    model.graph.node.remove(dq)
    model.graph.initializer.append(
        numpy_helper.from_array(np.full((HIDDEN, 2 * INNER), 0.01, np.float32), f"{name}.weight")
    )


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (per_channel_activation, "activation-scales: the activation has more than one scale"),
        (float_weight, "both-operands: the weight is not quantized"),
        (scale_the_contracting_axis, "weight-scales: the scale of the weight lies on the contracting axis 0"),
    ],
)
def test_a_fallback_names_the_rule_that_its_linear_breaks(
    rtx: TensorRt, graph: ExportedGraph, edit: Any, rule: str, tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    options = dataclasses.replace(LIMITS, allow_float_linears=2)
    artifact = rtx.compile(edited(graph, tmp_path, edit), folder, options)
    assert artifact.int8_linears == 13
    found = [(f["site"], f["profile"], f["reason"]) for f in artifact.details["fallbacks"]]
    assert found == [("layers.1.mlp.gate_up", 0, rule), ("layers.1.mlp.gate_up", 1, rule)]


@pytest.fixture
def standard(rtx: TensorRt, monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    """Return standard TensorRT on a device sm86, its library a stand-in around the real parser and builder."""
    stand_in = Path(__file__).parents[1] / "fakes" / "standard"
    monkeypatch.setenv("PYTHONPATH", str(stand_in), prepend=os.pathsep)
    monkeypatch.setattr(tensorrt, "probe", lambda module: Probe(module, "11.0.0.99", ("sm86 NVIDIA A10",)))
    return TensorRt(STANDARD)


def test_standard_tensorrt_is_built_by_the_same_code_and_counted_by_the_inspector(
    rtx: TensorRt, standard: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    for name in ("rtx", "standard"):
        (tmp_path / name).mkdir()
    found = standard.compile(graph, tmp_path / "standard", dataclasses.replace(LIMITS, targets=()))
    assert sorted(os.listdir(tmp_path / "standard")) == ["engine.json", "sm86.engine"]
    assert (found.engine, found.targets, found.int8_linears) == ("tensorrt", ("sm86",), 7 * LAYERS + 1)
    assert found.versions["tensorrt"] == "11.0.0.99"
    # Listing and inspector are two accounts of one build: every count is the same.
    ahead = rtx.compile(graph, tmp_path / "rtx", LIMITS)
    for count in ("kernels", "int8_gemms", "moves", "half_accumulators", "attention_matmuls", "unknown_gemms"):
        assert found.details[count] == ahead.details[count], count
    assert found.fused_attention == ahead.fused_attention == LAYERS
    assert found.details["command"].startswith("trtexec ")


def test_standard_tensorrt_fails_where_int8_was_lost(standard: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    broken = edited(graph, tmp_path, scale_the_contracting_axis)
    with pytest.raises(CheckFailed, match=r"13 of 15 linears .*gate_up.*contracting axis 0"):
        standard.compile(broken, tmp_path, dataclasses.replace(LIMITS, targets=()))
    assert not list(tmp_path.glob("*.engine"))


def test_standard_tensorrt_needs_its_device(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "probe", lambda module: Probe(module, "11.0.0.99"))
    with pytest.raises(MissingDependency, match="there is none here") as caught:
        TensorRt(STANDARD).compile(graph, tmp_path, LIMITS)
    assert "--engine tensorrt-rtx" in caught.value.hint
    monkeypatch.setattr(tensorrt, "probe", lambda module: Probe(module, "10.2.0", ("sm86 NVIDIA A10",)))
    with pytest.raises(MissingDependency, match=r"TensorRT 10\.2\.0 is older than 10\.3"):
        TensorRt(STANDARD).require()


def test_scales_in_half_show_their_hazard_in_the_plan_report(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "engine").mkdir()
    artifact = rtx.compile(export(tmp_path / "graph", scale_dtype="float16"), tmp_path / "engine", LIMITS)
    assert artifact.int8_linears == 7 * LAYERS + 1
    # Every packed product of both profiles: channels are scaled behind it, and its sum is written as half.
    assert len(artifact.details["half_accumulators"]) == 2 * (4 * LAYERS + 1)
