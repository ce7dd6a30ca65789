"""SmolLM2 is a llama; its weights fit a mistral without a window, and everything must then come out the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source


@pytest.fixture(scope="module")
def mistral(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    """Return SmolLM2 loaded as a mistral model."""
    folder: Path = tmp_path_factory.mktemp("mistral")
    for file in smollm2_folder.iterdir():
        if file.name == "config.json":
            continue
        (folder / file.name).symlink_to(file)
    config = json.loads((smollm2_folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    return load_folder(folder, resolve_source(str(folder)))


@pytest.mark.model
def test_smollm2_as_a_mistral_is_the_same_model(smollm2: TorchRunner, mistral: TorchRunner, tmp_path: Path) -> None:
    assert (smollm2.spec.family, mistral.spec.family) == ("llama", "mistral")
    ids = np.random.default_rng(0).integers(0, smollm2.spec.vocab_size, (1, 48))
    found: list[Any] = []
    for name, model in (("llama", smollm2), ("mistral", mistral)):
        prefix = model.compute_prefix((216,))
        scales = ActivationScales(
            dict.fromkeys(model.sites, 0.25), "max", Lineage(model.spec.weights_digest, prefix.digest, text="none"), 1
        )
        (tmp_path / name).mkdir()
        quantization = Quantization(prefix, QuantScheme(), scales)
        graph = export_graph(model.spec, model.weights, quantization, GraphForm(), tmp_path / name)
        data = (tmp_path / name / "model.onnx.data").read_bytes()
        found.append((model.logits(ids, prefix), prefix.keys, graph.sites, data))
        shutil.rmtree(tmp_path / name)
    for left, right in zip(*found, strict=True):
        assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right
