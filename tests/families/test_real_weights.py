"""SmolLM2 is a llama; its weights fit a mistral: without a window the same model, with one an example of lost sinks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

Mistral = Callable[[int | None], TorchRunner]


@pytest.fixture(scope="module")
def as_mistral(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    """Return a function from a window to SmolLM2 loaded as a mistral model."""

    def load(window: int | None) -> TorchRunner:
        folder: Path = tmp_path_factory.mktemp("mistral")
        for file in smollm2_folder.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        config = json.loads((smollm2_folder / "config.json").read_text())
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
        (folder / "config.json").write_text(json.dumps(config))
        return load_folder(folder, resolve_source(str(folder)))

    return load


@pytest.mark.model
def test_sinks_do_not_come_back_beyond_a_window(as_mistral: Mistral) -> None:
    model = as_mistral(64)
    ids, prefix = model.encode(python_topics("calibration").text)[None, :320], model.compute_prefix((216,))
    largest: list[torch.Tensor] = []
    downs = [linear for site, (linear, *_) in model.sites.items() if site.endswith("mlp.down")]
    hooks = [d.register_forward_pre_hook(lambda _, args: largest.append(args[0][0].abs().amax(-1))) for d in downs]

    def by_token(before: Prefix) -> torch.Tensor:
        largest.clear()
        model.token_nll(ids, before)
        return torch.stack(largest).amax(0)

    kept, lost = by_token(prefix), by_token(replace(prefix, slides=True))
    for hook in hooks:
        hook.remove()
    # On this text of Python 3.11: 74 within the window; beyond it 74, and 624 where the prefix falls out of sight.
    within = float(kept[:56].max())
    assert float(kept[64:].max()) < 1.5 * within
    assert float(lost[64:].max()) > 3 * within


@pytest.mark.model
def test_smollm2_as_a_mistral_is_the_same_model(smollm2: TorchRunner, as_mistral: Mistral, tmp_path: Path) -> None:
    mistral = as_mistral(None)
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
