"""What decides whether a compiled engine is used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.onnxruntime.settings import CPU, CUDA
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.compile import Compile, CompiledEngine
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore

NAME = CUDA.engine
PROVIDER = replace(CPU, engine=NAME, device="cpu", multiplies_floats=True)
"""The processor in the place of the GPU of ``onnxruntime-cuda``."""


@pytest.fixture
def graph(tiny_model: TorchRunner, tmp_path: Path) -> ExportedGraph:
    """Return a float16 graph of the tiny model."""
    prefix = tiny_model.compute_prefix((7,))
    parents = Lineage(tiny_model.spec.weights_digest, prefix.digest, text="none")
    scales = ActivationScales(dict.fromkeys(tiny_model.sites, 0.05), "max", parents, tokens=1)
    folder = tmp_path / "graph"
    folder.mkdir()
    form = GraphForm(dtype="float16")
    return export_graph(tiny_model.spec, tiny_model.weights, Quantization(prefix, QuantScheme(), scales), form, folder)


def test_an_engine_is_compiled_and_tried_again_where_there_is_another_gpu(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work folder may move to a machine with a GPU, or a GPU to the machine."""

    def compiled(gpus: tuple[str, ...]) -> tuple[CompiledEngine, bool]:
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntime, "gpus", lambda self: gpus)
            patch.setitem(ENGINES, NAME, OnnxRuntime(PROVIDER if gpus else CUDA))
            run = Run(StageStore(tmp_path / "work"))
            made = run.get(Compile.of(Given(graph), NAME, CompileOptions()))
        return made, run.times[-1].reused

    without, reused = compiled(())
    assert not without.artifact.ran
    assert not reused
    assert compiled(())[1]
    there, reused = compiled(("sm86 NVIDIA GeForce RTX 3090",))
    assert there.artifact.ran
    assert not reused
    assert compiled(("sm86 NVIDIA GeForce RTX 3090",))[1]
    assert not compiled(("sm90 NVIDIA H100",))[1], "a plan may be built for the first GPU"
    assert not compiled(())[0].artifact.ran


def test_an_engine_on_the_processor_has_no_gpu_in_its_key(graph: ExportedGraph) -> None:
    assert Compile.of(Given(graph), CPU.engine, CompileOptions()).gpus == ()
