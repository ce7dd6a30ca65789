"""A TensorRT plan, on the stand-in for a device: one sequence at a time, with what it computed last reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_plans import device, plan_of

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.session import BatchSession
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.export.write import export_graph
from cushion_deploy.runtime import generate
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.request import Delivery, SequenceRequest
from cushion_deploy.serve.rows import open_rows
from cushion_deploy.serve.scheduler import Limits, Scheduler

__all__ = ["device"]


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_conversations_on_a_plan_get_the_tokens_of_generate(
    tiny: Any, device: Any, tokenizer: Any, tmp_path: Path
) -> None:
    form = GraphForm(dtype="float16", quantized=False, prefix="baked")
    loaded = tiny.loaded
    graph = export_graph(loaded.spec, loaded.weights, Quantization(tiny.prefix, QuantScheme()), form, tmp_path)
    session = TensorRtSession(plan_of(graph), graph.contract, "tensorrt_rtx")
    assert not isinstance(session, BatchSession)
    scheduler = Scheduler(open_rows(session, 8, KvPool(0)), tokenizer, frozenset({2}), Limits(chunk=4))
    assert scheduler.rows.capacity == 1
    random = np.random.default_rng(1)
    text = random.integers(3, 380, 5).tolist()
    for turn in range(3):
        got: list[Delivery] = []
        scheduler.submit([SequenceRequest(tuple(text), 4)], lambda _, delivery, got=got: got.append(delivery))
        while scheduler.step():
            pass
        tokens = [d.token.token_id for d in got if d.token]
        usage = got[-1].usage
        assert usage is not None
        assert (usage.cached_tokens > 0) == (turn > 0)
        other = TensorRtSession(plan_of(graph), graph.contract, "tensorrt_rtx")
        assert tokens == [e.token_id for e in generate(other, tokenizer, text, max_new_tokens=4, stop_ids={2})]
        other.close()
        text += [*tokens, *random.integers(3, 380, 2).tolist()]
    session.close()
