"""A static cache, updated in place, gives what the prefix in the graph and a growing cache give, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph

TOKENS = (7, 1, 100)
P, CAPACITY, LENGTH = len(TOKENS), 50, 40
IDS = np.random.default_rng(5).integers(3, 320, (2, LENGTH))
PIECES = ((0, 9), (9, 10), (10, 11), (11, 30), (30, 31), (31, LENGTH))

Feed = dict[str, np.ndarray]


class Graphs:
    """The three forms of one float graph in plain ONNX Runtime, fed by hand."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.prefix = model.compute_prefix(TOKENS)
        self.baked, self.growing, self.static = (
            _open(model, self.prefix, folder / name, GraphForm(quantized=False, **form))
            for name, form in (
                ("baked", {}),
                ("growing", {"prefix": "cache"}),
                ("static", {"prefix": "cache", "cache": "static", "capacity": CAPACITY}),
            )
        )

    def slots(self, length: int, rows: int, rest: float = 0.0) -> Feed:
        """Return caches of ``length`` slots that begin with the prefix."""
        found = {}
        for i in range(len(self.prefix.keys)):
            for part, array in (("key", self.prefix.keys[i]), ("value", self.prefix.values[i])):
                cache = np.full((rows, array.shape[0], length, array.shape[2]), rest, np.float32)
                cache[:, :, :P] = array
                found[f"past_key_values.{i}.{part}"] = cache
        return found

    def run_growing(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Feed]:
        return _run(self.growing, _tokens(ids, mask, 0, ids.shape[1], P), self.slots(P, len(ids)))

    def run_baked(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        empty = {name: cache[:, :, :0] for name, cache in self.slots(P, len(ids)).items()}
        return _run(self.baked, _tokens(ids, mask, 0, ids.shape[1], 0), empty)[0]

    def run_static(
        self, ids: np.ndarray, mask: np.ndarray, pieces: Any, rest: float = 0.0, closed: int = 0
    ) -> tuple[np.ndarray, Feed]:
        """Feed pieces; ``rest`` lies in the free slots, ``closed`` is what the mask says of them."""
        past, parts = self.slots(CAPACITY, len(ids), rest), []
        for begin, end in pieces:
            feed = _tokens(ids, mask, begin, end, P)
            free = ((0, 0), (0, CAPACITY - feed["attention_mask"].shape[1]))
            feed["attention_mask"] = np.pad(feed["attention_mask"], free, constant_values=closed)
            feed["write_indices"] = np.full(len(ids), P + begin)
            logits, past = _run(self.static, feed, past)
            parts.append(logits)
        return np.concatenate(parts, axis=1), past


def _open(model: Any, prefix: Prefix, folder: Path, form: GraphForm) -> Any:
    folder.mkdir()
    graph = export_graph(model.spec, model.weights, Quantization(prefix, QuantScheme()), form, folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])


def _tokens(ids: np.ndarray, mask: np.ndarray, begin: int, end: int, before: int) -> Feed:
    """Return the inputs for tokens ``begin`` to ``end`` of rows, ``before`` of them counted in front of all."""
    counted = np.maximum(mask.cumsum(1) - 1, 0)[:, begin:end] + before
    kept = np.pad(mask[:, :end], ((0, 0), (before, 0)), constant_values=1)
    return {"input_ids": ids[:, begin:end], "attention_mask": kept, "position_ids": counted}


def _run(session: Any, feed: Feed, past: Feed) -> tuple[np.ndarray, Feed]:
    names = [o.name for o in session.get_outputs()]
    out = dict(zip(names, session.run(names, feed | past), strict=True))
    return out.pop("logits"), {name.replace("present", "past_key_values"): value for name, value in out.items()}


@pytest.fixture(scope="module")
def graphs(load_variant: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Graphs]:
    """Return a function from a variant to its three graphs."""
    made: dict[str, Graphs] = {}

    def find(name: str) -> Graphs:
        if name not in made:
            made[name] = Graphs(load_variant(name), tmp_path_factory.mktemp("graphs"))
        return made[name]

    return find


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float64) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_pieces_and_single_tokens_are_the_whole_text(variant: str, graphs: Any) -> None:
    each, mask = graphs(variant), np.ones_like(IDS)
    expected, present = each.run_growing(IDS, mask)
    close(each.run_baked(IDS, mask), expected)
    for pieces in (((0, LENGTH),), PIECES):
        found, cache = each.run_static(IDS, mask, pieces)
        close(found, expected)
        for name, value in present.items():
            close(cache[name][:, :, : P + LENGTH], value)
            assert not cache[name][:, :, P + LENGTH :].any(), "a free slot was written"


def test_padding_on_the_left_and_what_lies_in_free_slots_change_nothing(variant: str, graphs: Any) -> None:
    each = graphs(variant)
    mask = np.ones_like(IDS)
    mask[1, :6] = 0
    expected = each.run_baked(IDS, mask)
    # Free slots are closed by causality, so the mask may open them, and old keys may lie there.
    for rest, closed in ((0.0, 0), (3.0, 0), (3.0, 1)):
        found, _ = each.run_static(IDS, mask, PIECES, rest, closed)
        close(found[0], expected[0])
        close(found[1, 6:], expected[1, 6:])
