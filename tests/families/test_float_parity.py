"""The float graph of every family is the model, with its prefix in sight: equal to transformers at every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph

CLOSE = 1e-4
PREFIX = (7, 1, 100)
LENGTH = 40
IDS = np.random.default_rng(5).integers(3, 320, (1, LENGTH))

Graph = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def graph_of(load_variant: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """Return a function from a variant, prefix tokens and their place to its float graph in plain ONNX Runtime."""
    made: dict[Any, Graph] = {}

    def graph(name: str, tokens: tuple[int, ...] = PREFIX, place: Any = "baked") -> Graph:
        if (name, tokens, place) not in made:
            model = load_variant(name)
            folder = tmp_path_factory.mktemp("graph")
            quantization = Quantization(model.compute_prefix(tokens), QuantScheme())
            form = GraphForm(quantized=False, prefix=place)
            exported = export_graph(model.spec, model.weights, quantization, form, folder)
            made[name, tokens, place] = open_graph(exported.path)
        return made[name, tokens, place]

    return graph


def open_graph(path: Path) -> Graph:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(
        ids: np.ndarray, past: dict[str, np.ndarray] | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        feed = {
            i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        feed |= past or {}
        before = next(iter(feed.values())).shape[2]
        if mask is None:
            mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        feed |= {"input_ids": ids, "attention_mask": mask}
        feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, before:]
        names = [o.name for o in session.get_outputs()]
        out = dict(zip(names, session.run(names, feed), strict=True))
        return out.pop("logits"), {name.replace("present", "past_key_values"): v for name, v in out.items()}

    return run


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


def test_at_once_and_past_the_window(variant: str, graph_of: Any, expected_of: Any) -> None:
    expected = expected_of(variant, IDS[0].tolist(), PREFIX)
    assert np.ptp(expected, axis=-1).min() > 0.5, "the model must have something to say"
    assert largest(graph_of(variant)(IDS)[0][0], expected) <= CLOSE


def test_without_a_prefix(variant: str, graph_of: Any, expected_of: Any) -> None:
    assert largest(graph_of(variant, ())(IDS)[0][0], expected_of(variant, IDS[0].tolist(), ())) <= CLOSE


def test_decoding_through_the_cache(variant: str, graph_of: Any, expected_of: Any) -> None:
    graph, parts, past = graph_of(variant), [], None
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 30), *((i, i + 1) for i in range(30, LENGTH))):
        out, past = graph(IDS[:, begin:end], past)
        parts.append(out[0])
    assert largest(np.concatenate(parts), expected_of(variant, IDS[0].tolist(), PREFIX)) <= CLOSE


def test_padding_on_the_left_changes_nothing(variant: str, graph_of: Any, expected_of: Any) -> None:
    graph, padding = graph_of(variant), 6
    batch = np.stack([IDS[0], np.r_[[0] * padding, IDS[0, padding:]]])
    mask = (np.arange(LENGTH) >= np.array([[0], [padding]])).astype(np.int64)
    expected = [expected_of(variant, IDS[0].tolist(), PREFIX), expected_of(variant, IDS[0, padding:].tolist(), PREFIX)]
    at_once, _ = graph(batch, mask=mask)
    _, past = graph(batch[:, :20], mask=mask[:, :20])
    later, _ = graph(batch[:, 20:], past, mask)
    assert largest(at_once[0], expected[0]) <= CLOSE
    assert largest(at_once[1, padding:], expected[1]) <= CLOSE
    assert largest(later[0], expected[0][20:]) <= CLOSE
    assert largest(later[1], expected[1][20 - padding :]) <= CLOSE


def test_the_prefix_is_the_one_in_transformers_own_cache(variant: str, graph_of: Any, load_variant: Any) -> None:
    model = load_variant(variant)
    behind = model.logits(IDS, model.compute_prefix(PREFIX))
    assert largest(graph_of(variant)(IDS)[0], behind) <= CLOSE
    assert largest(graph_of(variant, ())(IDS)[0], behind) > 100 * CLOSE


def test_a_prefix_in_the_cache_is_a_prefix_in_the_graph(variant: str, graph_of: Any, load_variant: Any) -> None:
    prefix = load_variant(variant).compute_prefix(PREFIX)
    batch = np.concatenate([IDS, IDS[:, ::-1]])
    slots = {}
    for i in range(len(prefix.keys)):
        slots[f"past_key_values.{i}.key"] = prefix.keys[i][None].repeat(2, 0)
        slots[f"past_key_values.{i}.value"] = prefix.values[i][None].repeat(2, 0)
    baked, present = graph_of(variant)(batch)
    cached, behind = graph_of(variant, PREFIX, "cache")(batch, slots)
    assert largest(baked, cached) <= 1e-5 * np.abs(baked).max()
    for name, value in present.items():
        assert largest(value, behind[name][:, :, len(PREFIX) :]) <= 1e-5 * np.abs(value).max()
