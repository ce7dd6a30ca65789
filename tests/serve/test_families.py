"""Batches of rows of every family, with prefixes in the graph and in the cache, in floating point and in INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kv_cache import choose_kv_scales, observe_cache
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.rows import BatchedRows

WINDOW = {"sliding_window": 12}


@pytest.mark.parametrize(
    ("family", "options", "prefix_mode", "cache"),
    [
        ("mistral", WINDOW, "baked", "growing"),
        ("mistral", WINDOW, "cache", "growing"),
        ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 64}, "baked", "growing"),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "cache", "growing"),
        ("llama", {}, "cache", "int8"),
        ("llama", {}, "baked", "int8"),
    ],
)
def test_rows_of_a_batch_are_rows_alone(
    tiny_writer: Any, tmp_path: Path, family: str, options: Any, prefix_mode: Any, cache: Any
) -> None:
    folder = tiny_writer(tmp_path / "model", model_type=family, **options)
    model = load_folder(folder, resolve_source(str(folder)))
    prefix = model.compute_prefix((7, 1, 100))
    random = np.random.default_rng(6)
    kv = None
    if cache == "int8":
        ids = random.integers(3, 320, (1, 40))
        kv = choose_kv_scales(
            observe_cache(model, prefix, ids, np.ones_like(ids), "per-head"), RangeEstimator("max"), "per-head",
            prefix, model.lineage(prefix, "c"), 40, with_prefix=prefix_mode == "cache",
        )  # fmt: skip
    quantization = Quantization(prefix, QuantScheme(), kv_scales=kv)
    (tmp_path / "graph").mkdir()
    form = GraphForm(quantized=False, prefix=prefix_mode, cache=cache)
    graph = export_graph(model.spec, model.weights, quantization, form, tmp_path / "graph")
    rows, alone = BatchedRows(open_session(graph, threads=1), 3, KvPool(1 << 20)), open_session(graph, threads=1)
    texts = [random.integers(3, 320, n).tolist() for n in (30, 3, 17)]
    for key, text in enumerate(texts):
        rows.open(key, text)
        rows.prefill(key, text, last=True)
    for step in range(12):
        if step == 6:
            rows.close(0)
        live = [key for key in range(3) if key or step < 6]
        fed = {key: int(random.integers(3, 320)) for key in live}
        for key, logits in rows.decode(fed).items():
            texts[key].append(fed[key])
            alone.reset()
            expected = alone.run(np.array([texts[key]]), need_logits="last")
            assert expected is not None
            # A rounding of an INT8 cache can tip over where sums are added in another order.
            np.testing.assert_allclose(logits, expected[0, -1], atol=2e-3 if cache == "growing" else 0.05)
