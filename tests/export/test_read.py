"""A written graph is read with its tensors, or refused in words where the library would refuse to read them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.errors import UsageError
from cushion_deploy.export.read import read_model


@pytest.fixture
def copied(make_model: Any, export_float: Any, tmp_path: Path) -> Path:
    """Return the file of a graph in a folder of its own."""
    graph: ExportedGraph = export_float(make_model())
    for file in graph.files:
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path / graph.path.name


def test_tensors_are_those_that_onnx_reads(copied: Path) -> None:
    expected = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(copied).graph.initializer}
    found = {name: value.const_value.numpy() for name, value in read_model(copied).graph.initializers.items()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_second_hard_link_is_named_with_what_to_do(copied: Path) -> None:
    (data,) = (path for path in copied.parent.iterdir() if path.suffix == ".data")
    try:
        os.link(data, copied.parent / "second")
    except OSError:
        pytest.skip("no hard links here")
    with pytest.raises(UsageError, match=r"\.data has a second hard link") as caught:
        read_model(copied)
    assert "cp -r" in str(caught.value.hint)
