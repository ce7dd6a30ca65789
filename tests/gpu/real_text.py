"""A model quantized on real text: its graphs, what fake-quant says of other text, and the rung that compares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.ladder import engine_rung
from cushion_deploy.parity.reference import torch_reference
from cushion_deploy.parity.torch_results import TorchReference

WINDOW = 96


@dataclass(frozen=True)
class OnText:
    """A quantized model with its reference: windows of text that was not calibrated on."""

    model: TorchRunner
    quantization: Quantization
    reference: TorchReference

    @classmethod
    def of(cls, model: TorchRunner, token_ids: tuple[int, ...], windows: int) -> OnText:
        """Calibrate a model behind a prefix on as many windows as are scored."""
        prefix = model.compute_prefix(token_ids)
        calibration, evaluation = (_windows(model, part, windows) for part in ("calibration", "evaluation"))
        histograms = observe_sites(model, prefix, calibration, np.ones_like(calibration))
        lineage = model.lineage(prefix, "text")
        scales = choose_scales(histograms, RangeEstimator("max"), lineage, calibration.size)
        quantization = Quantization(prefix, QuantScheme(), scales)
        return cls(model, quantization, torch_reference(model, quantization, evaluation[:1], evaluation))

    def graph(self, folder: Path, dtype: Dtype, *, quantized: bool = True) -> ExportedGraph:
        """Export the graph into a new folder."""
        folder.mkdir()
        form = GraphForm(dtype=dtype, quantized=quantized)
        return export_graph(self.model.spec, self.model.weights, self.quantization, form, folder)

    def check(self, session: DecoderSession) -> ParityCheck:
        """Return the check of the parity ladder for an engine: its losses against those of fake-quant."""
        (check,), _ = engine_rung("engine against fake-quant", self.reference, session)
        return check


def _windows(model: TorchRunner, part: Any, count: int) -> Any:
    """Return windows of the offline text, int64 ``[count, WINDOW]``."""
    ids = np.asarray(model.encode(python_topics(part).text), dtype=np.int64)
    return ids[: count * WINDOW].reshape(count, WINDOW)
