"""A build measures the range of values and exports the graph of a plan in the type that has room for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Node
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.plan import ReadOnlyRun
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore

SIZE = 45_000.0
"""Of every embedding in one channel: within the range of float16, but not what the model adds to it."""

Plan = Callable[..., tuple[Run, Pipeline, Node[ExportedGraph]]]


@pytest.fixture
def plan(tiny_writer: Any, tiny_folder: Path, tmp_path: Path) -> Plan:
    """Return a function that plans the graph that an engine compiles, of a tiny model, planted or not."""
    (tmp_path / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)

    def edit(module: Any) -> None:
        module.model.embed_tokens.weight[:, 5] = SIZE
        for layer in module.model.layers[:2]:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[0] = 0.0
                linear.weight[0, 5] = 1.0
            layer.mlp.down_proj.weight[5] = 0.0
            layer.mlp.down_proj.weight[5, 0] = 0.7 * SIZE / 64

    def planned(
        dtype: str, *, planted: bool, engine: str = "tensorrt-rtx"
    ) -> tuple[Run, Pipeline, Node[ExportedGraph]]:
        folder = tiny_writer(tmp_path / "planted", edit) if planted else tiny_folder
        settings = {"calibration.windows": 4, "calibration.window": 64, "tensorrt.max_context": 64}
        data = {"model": str(folder), "calibration.data": str(tmp_path / "calib.txt"), "tensorrt.dtype": dtype}
        pipeline = Pipeline.of(Recipe().merged({"search.enabled": False, **settings, **data}))
        run, quantization = Run(StageStore(tmp_path / "work")), pipeline.quantized.quantization
        return run, pipeline, pipeline.engine_graph(quantization, pipeline.graph(quantization), engine)

    return planned


def stages(run: Run) -> list[str]:
    return [time.stage for time in run.times if time.stage.startswith(("export", "value"))]


def dry(run: Run, graph: Node[ExportedGraph]) -> list[str]:
    """Return what a dry run says of the stages that measure and export."""
    rows = [row.to_json() for row in ReadOnlyRun.of(run).plan(graph)]
    found = [row for row in rows if row["stage"].startswith(("export", "value"))]
    words = {"finished": "finished", "if_needed": "if needed"}
    return [" ".join([row["stage"], *(text for key, text in words.items() if row[key])]) for row in found]


def test_a_model_in_range_gets_a_float16_plan(plan: Plan) -> None:
    run, pipeline, planned = plan("auto", planted=False)
    assert dry(run, planned) == ["export", "value-range", "export-float16 if needed"]
    assert run.get(planned).contract.dtype == "float16"
    assert stages(run) == ["value-range", "export-float16"]
    found = run.get(pipeline.plan_type(pipeline.quantized.quantization))
    assert found.measured is not None
    assert found.measured.largest.value < 1000
    assert found.measured.values[0].part == "inputs"


def test_a_residual_stream_beyond_half_gets_a_bfloat16_plan(plan: Plan) -> None:
    run, pipeline, planned = plan("auto", planted=True)
    assert run.get(planned).contract.dtype == "bfloat16"
    assert stages(run) == ["value-range", "export-bfloat16"], "no float16 graph is left in the work folder"
    assert dry(run, planned) == ["export", "value-range finished", "export-bfloat16 finished"]
    found = run.get(pipeline.plan_type(pipeline.quantized.quantization)).measured
    assert found is not None
    assert found.largest.tensor == "residual"
    # 45,000 and twice 31,500: 64 is silu(8) * 8, and the norm makes the channel 8.
    by_part = {value.part: value.value for value in found.values}
    assert by_part["layers.0.attn"] == pytest.approx(SIZE, rel=0.01)
    assert by_part["layers.0.mlp"] == pytest.approx(1.7 * SIZE, rel=0.01)
    assert by_part["layers.1.mlp"] == pytest.approx(2.4 * SIZE, rel=0.01)


def test_float16_against_the_measurement_is_an_error(plan: Plan) -> None:
    run, _, planned = plan("float16", planted=True)
    with pytest.raises(UsageError, match=r"the residual stream reaches 10\d,\d{3} in layers\.\d\.\w+ at token '"):
        run.get(planned)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_type_with_the_range_of_float32_needs_no_measurement(dtype: str, plan: Plan) -> None:
    run, _, planned = plan(dtype, planted=True)
    assert run.get(planned).contract.dtype == dtype
    assert "value-range" not in stages(run)


def test_an_export_is_planned_only_for_an_engine_that_cannot_run_the_graph_of_the_bundle(plan: Plan) -> None:
    run, pipeline, planned = plan("auto", planted=False, engine="onnxruntime-tensorrt")
    # Whether the embedding is stored as codes, which this engine does not read, is not known before the export.
    assert dry(run, planned) == ["export", "export if needed"]
    assert run.get(planned).digest == run.get(pipeline.graph(pipeline.quantized.quantization)).digest
    assert stages(run) == ["export"]
    assert dry(run, planned) == ["export finished"]
