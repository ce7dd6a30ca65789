"""Integer sums of OpenVINO are tried before anything runs, on this processor and as on an older one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cushion_deploy.engines.openvino import kernels
from cushion_deploy.engines.openvino.engine import OpenVino
from cushion_deploy.engines.openvino.kernels import Machine, this_machine
from cushion_deploy.errors import ExitCode, MissingDependency

ASK = """
from cushion_deploy.engines.openvino.engine import OpenVino
from cushion_deploy.engines.openvino.kernels import this_machine
from cushion_deploy.errors import MissingDependency
try:
    OpenVino().require()
    print(this_machine().exact, "accepted")
except MissingDependency as e:
    print(this_machine().exact, e.message, "|", e.hint)
"""


def has(flag: str) -> bool:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return f" {flag} " in file.read()


x86 = pytest.mark.skipif(not has("avx2"), reason="no x86 with AVX2, which is what saturates")


@x86
def test_a_processor_without_vnni_is_refused_and_told_what_to_do(python: Callable[..., str]) -> None:
    # vpmaddubsw adds pairs of products in 16 bits: not a stand-in, OpenVINO runs its kernels for AVX2 here.
    found = python(ASK, isa="AVX2")
    assert found.startswith("False OpenVINO adds products of INT8 codes with saturation on this processor (Intel AVX2)")
    assert "--engine onnxruntime" in found.partition("|")[2]


@pytest.mark.skipif(not has("avx_vnni"), reason="no AVX-VNNI on this processor")
def test_a_processor_with_vnni_is_accepted(python: Callable[..., str]) -> None:
    assert python(ASK, isa="AVX2_VNNI") == "True accepted"


def test_the_verdict_stops_sessions_and_compilations(monkeypatch: pytest.MonkeyPatch, tiny_graphs, tmp_path) -> None:
    from cushion_deploy.engines.base import CompileOptions

    monkeypatch.setattr(kernels, "this_machine", lambda: Machine("meta=1.0;isa=Intel AVX2", exact=False))
    engine, graph = OpenVino(), tiny_graphs["int8"]
    for action in (
        engine.require,
        lambda: engine.open(graph, threads=1),
        lambda: engine.compile(graph, tmp_path, CompileOptions()),
    ):
        with pytest.raises(MissingDependency, match=r"saturation on this processor \(Intel AVX2\)") as caught:
            action()
        assert caught.value.exit_code == ExitCode.MISSING
    assert not list(tmp_path.iterdir())
    # A float graph has no integer sums.
    engine.open(tiny_graphs["float"], threads=1).run(__import__("numpy").array([[5, 6]]))


def test_the_linear_that_is_tried_runs_in_int8() -> None:
    import io

    import numpy as np

    from cushion_deploy.engines.one_linear import one_linear
    from cushion_deploy.engines.openvino.library import core, settings

    model = core().read_model(io.BytesIO(one_linear(np.full((64, 8), 3, dtype=np.int8))))
    layers = core().compile_model(model, "CPU", settings(1)).get_runtime_model().get_ops()
    found = {str(n.get_rt_info()["layerType"].value): str(n.get_rt_info()["runtimePrecision"].value) for n in layers}
    assert found["FullyConnected"] == "i8"


def test_requirements_name_version_and_instruction_set() -> None:
    from importlib import metadata

    machine = this_machine()
    assert f"ov={metadata.version('openvino')}" in machine.requirements
    assert kernels.instruction_set(machine) in machine.requirements
    assert kernels.instruction_set(Machine("another form", exact=True)) == "another form"


def test_nothing_that_can_send_is_loaded_and_nothing_connects(python: Callable[..., str], tiny_graphs) -> None:
    code = """
import socket, sys, threading
from pathlib import Path
def refuse(*a, **k):
    print("connected", a)
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import numpy as np
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.openvino.session import open_session
import json
folder, data = Path(sys.argv[1]), json.loads(sys.argv[2])
session = open_session(ExportedGraph.from_json(data, folder), threads=1)
session.run(np.array([[5, 6]]))
import openvino
print([m for m in sys.modules if m.startswith("openvino_telemetry")], threading.active_count())
import openvino_telemetry  # other code of the program can still import it
"""
    import json

    graph = tiny_graphs["float"]
    assert python(code, str(graph.path.parent), json.dumps(graph.to_json())) == "[] 1"


def test_a_library_that_does_not_run_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("Exception from src/core\nno plugin for the CPU")

    monkeypatch.setattr(kernels, "core", broken)
    kernels.this_machine.cache_clear()
    with pytest.raises(MissingDependency, match="does not run a linear on this machine: no plugin for the CPU"):
        OpenVino().require()
