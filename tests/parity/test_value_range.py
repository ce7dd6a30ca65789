"""The largest values of a 16-bit graph are those of transformers, with the token at which they occur."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.parity.value_range import largest_values


def hooked(model: Any, prefix: Any, ids: Any) -> dict[str, Any]:
    """Return from transformers the largest magnitude of each token, by part and operator of the graph."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found[name] = value.detach()[0].abs().amax(-1).numpy()

        return hook

    handles = []
    for i, layer in enumerate(model.layers):
        handles.append(layer.register_forward_hook(keep(f"layers.{i}.mlp residual")))
        read = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, i=i: found.__setitem__(f"layers.{i}.attn residual", args[0][0].abs().amax(-1).numpy())
        )
        handles.append(read)
    with torch.inference_mode():
        logits = model.run(torch.from_numpy(ids[None]), model.past(prefix)).logits
    found["logits"] = logits[0].abs().amax(-1).numpy()
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def measured(tiny_writer: Any, tmp_path: Path) -> Any:
    """Return a function that measures a float graph of a tiny model whose residual stream dominates every block."""

    def measure(windows: list[Any], **form: Any) -> tuple[Any, Any, Any]:
        def edit(module: Any) -> None:
            module.model.embed_tokens.weight *= 100.0

        folder = tiny_writer(tmp_path / "tiny", edit)
        model = load_folder(folder, resolve_source(str(folder)))
        prefix = model.compute_prefix((7, 1))
        graph = export_graph(
            model.spec,
            model.weights,
            Quantization(prefix, QuantScheme()),
            GraphForm(dtype="float16", quantized=False, **form),
            tmp_path,
        )
        return model, prefix, largest_values(graph, windows, lambda token: f"<{token}>")

    return measure


@pytest.mark.parametrize("form", [{}, {"prefix": "cache"}, {"opset": 20}])
def test_the_largest_residuals_are_those_of_transformers(form: dict[str, Any], measured: Any, plain_ids: Any) -> None:
    # Longer than a piece, so that the cache is used; and of several lengths.
    windows = [plain_ids[:200], plain_ids[200:250], plain_ids[250:430]]
    model, prefix, values = measured(windows, **form)
    runs = [hooked(model, prefix, ids) for ids in windows]
    by_part = {value.part: value for value in values}
    for i in range(3):
        for block in ("attn", "mlp"):
            found, name = by_part[f"layers.{i}.{block}"], f"layers.{i}.{block} residual"
            peaks = [float(run[name].max()) for run in runs]
            best = int(np.argmax(peaks))
            position = int(runs[best][name].argmax())
            assert found.tensor == "residual"
            assert found.value == pytest.approx(peaks[best], rel=2e-3), "weights are stored in half"
            assert (found.position, found.token_id) == (position, windows[best][position])
            assert found.token == f"<{found.token_id}>"
    # The head runs for the last token of each piece of 128.
    last = [[i for i in range(len(ids)) if i % 128 == 127 or i == len(ids) - 1] for ids in windows]
    logits = [(float(run["logits"][i]), number, i) for number, run in enumerate(runs) for i in last[number]]
    assert by_part["head"].value == pytest.approx(max(logits)[0], rel=2e-3)
    assert by_part["head"].position == max(logits)[2]
    assert list(by_part)[-1] == "head"


def test_an_overflow_that_a_tanh_swallows_is_none(tiny_writer: Any, plain_ids: Any, tmp_path: Path) -> None:
    def edit(module: Any) -> None:
        mlp = module.transformer.h[1].mlp
        mlp.c_fc.weight[:, 0] = 0.0
        # GELU computes 0.0447 * 150^3 = 150,939 on the way to 150.
        mlp.c_fc.bias[0] = 150.0
        mlp.c_proj.weight[0] = 0.0

    folder = tiny_writer(tmp_path / "tiny", edit, "gpt2", n_embd=64, n_layer=3, n_head=4, n_positions=256)
    model = load_folder(folder, resolve_source(str(folder)))
    quantization = Quantization(model.no_prefix(), QuantScheme())
    graph = export_graph(model.spec, model.weights, quantization, GraphForm(dtype="float16", quantized=False), tmp_path)
    found = {value.part: value for value in largest_values(graph, [plain_ids[:100]], str)}
    assert found["layers.1.mlp"].value == pytest.approx(150.0, rel=1e-3)
    assert max(value.value for value in found.values()) < 1000
