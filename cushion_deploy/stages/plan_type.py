"""Plan type: measure the largest values of the float16 graph, and choose the floating-point type of plans from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.dtypes import PlanDtype
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.value_range import HALF_MAX, LargestValue, PlanType, ValueRange, choose_plan_type
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.export import EXPORT_SECONDS
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import WINDOW, calibration_windows, require_positions
from cushion_deploy.store import require_space
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

RESULT = "value_range.json"


@dataclass(frozen=True)
class MeasureRange(Stage[ValueRange]):
    """Measure the largest values of the float16 graph of a quantization on the calibration text.

    The graph itself is run, not the model in torch: what has the type of a plan in it is known exactly.

    Attributes:
        model: the model in floating point.
        quantization: the quantization that the graph implements.
        form: the form of the graph, with a cache that grows.
        text: the calibration text.
        windows: maximum number of windows.
        window: tokens in each window; None for the default of the model.
    """

    name: ClassVar[str] = "value-range"
    version: ClassVar[int] = 2
    runs_model: ClassVar[bool] = False
    model: Node[TorchRunner]
    quantization: Node[Quantization]
    form: GraphForm
    text: Node[Corpus]
    windows: int
    window: int | None

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the largest values; the graph is deleted afterwards."""
        from cushion_deploy.export.write import export_graph
        from cushion_deploy.parity.value_range import largest_values

        model, quantization, text = inputs.get(self.model), inputs.get(self.quantization), inputs.get(self.text)
        ids, mask = calibration_windows(model, text, self.windows, self.window)
        require_positions("calibration.window", ids.shape[1], quantization.prefix.length, model.spec)
        values = _of_prefix(model, quantization)
        if all(found.value <= HALF_MAX for found in values):
            require_space(out, self.disk(model.spec))
            model.placed.unload()
            with TemporaryDirectory(dir=out) as folder:
                with elapsed(inputs.progress, "exporting the graph to measure"):
                    graph = export_graph(model.spec, model.weights, quantization, self.form, Path(folder))
                rows = [row[kept.astype(bool)] for row, kept in zip(ids, mask, strict=True)]
                values = *values, *largest_values(graph, rows, model.token_text, inputs.progress)
        write_json(out / RESULT, ValueRange(values, text.name, int(mask.sum())).to_json())

    def read(self, folder: Path) -> ValueRange:
        """Return the largest values."""
        return ValueRange.from_json(read_json(folder / RESULT))

    def disk(self, spec: ModelSpec) -> int:
        """Return two bytes per parameter for the graph, which exists while the stage runs."""
        return 2 * spec.parameters

    def seconds(self, speed: Speed) -> float:
        """Export a graph, and run it on the windows."""
        return EXPORT_SECONDS * speed.spec.parameters + self.windows * (self.window or WINDOW) * speed.compared


def _of_prefix(model: TorchRunner, quantization: Quantization) -> tuple[LargestValue, ...]:
    """Return the largest key or value of the prefix, which a float16 graph stores; none without a prefix."""
    prefix = quantization.prefix
    if not prefix.length:
        return ()
    # Layers, heads and channels in one: [2, length].
    largest = np.stack([np.abs(part).max(axis=(0, 1, 3)) for part in (prefix.keys, prefix.values)])
    part, position = np.unravel_index(int(largest.argmax()), largest.shape)
    token = prefix.token_ids[position]
    name = ("a key", "a value")[part]
    return (LargestValue("prefix", name, float(largest.max()), model.token_text(token), token, -1),)


def has_plan_type(engine: str) -> bool:
    """Return whether the type of an engine's graph is that of plans: it compiles float16."""
    return "float16" in ENGINES[engine].dtypes


@dataclass(frozen=True)
class ChoosePlanType(Derived[PlanType]):
    """The floating-point type of plans.

    Attributes:
        wanted: the setting of the recipe.
        measured: the largest values of the float16 graph; None if the type does not depend on them.
    """

    wanted: PlanDtype
    measured: Node[ValueRange] | None

    def make(self, inputs: Inputs) -> PlanType:
        """Return the type; raises UsageError if float16 is asked for and a value exceeds its range."""
        return choose_plan_type(self.wanted, inputs.get(self.measured) if self.measured else None)
