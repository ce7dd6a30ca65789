"""An INT8 embedding in the ladder: its rows are compared bit for bit, also where a tied head reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.parity.reference import embedding_codes
from cushion_deploy.parity.stored_values import embedding_rung

CODES, SCALES = "model.embed_tokens.weight_codes", "model.embed_tokens.weight_scales"


@pytest.fixture
def graph(deployed, tmp_path: Path) -> Any:
    """Return the graph of the tiny model with an INT8 embedding."""
    scheme = QuantScheme(quantize_head=False, int8_embedding=True)
    quantization = Quantization(deployed.prefix, scheme, deployed.scales)
    return export_graph(deployed.model.spec, deployed.model.weights, quantization, GraphForm(), tmp_path)


def test_an_intact_embedding_holds(graph, deployed) -> None:
    (check,) = embedding_rung("rung", graph, embedding_codes(deployed.model))
    rows = deployed.model.spec.vocab_size
    assert (check.passed, check.value, check.note) == (True, 0, f"{rows} rows compared bit for bit")


@pytest.mark.parametrize("name", [CODES, SCALES])
def test_a_changed_row_is_named(name: str, graph, deployed, sabotaged) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        if name == CODES:
            tensors[name][5, 3] ^= 1
        else:
            tensors[name][5, 1] = np.nextafter(tensors[name][5, 1], np.float32(np.inf))

    (check,) = embedding_rung("rung", sabotaged(graph, edit), embedding_codes(deployed.model))
    assert (check.passed, check.value) == (False, 1)
    assert check.note.startswith("first differing row: 5; ")


def test_a_graph_with_a_float_embedding_has_no_right_row(deployed) -> None:
    (check,) = embedding_rung("rung", deployed.graph, embedding_codes(deployed.model))
    assert check.value == deployed.model.spec.vocab_size


def test_reference_codes_are_those_of_numpy(deployed) -> None:
    codes, scales = embedding_codes(deployed.model)
    table = deployed.model.module.get_submodule("model.embed_tokens").weight.numpy()
    blocks = table.reshape(len(table), -1, 32)
    np.testing.assert_array_equal(scales, np.abs(blocks).max(axis=2) / np.float32(127))
    np.testing.assert_array_equal(codes.reshape(blocks.shape), np.rint(blocks / scales[:, :, None]).astype(np.int8))
