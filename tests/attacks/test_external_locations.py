"""The files that a graph reads are known before any engine opens it: against ``onnx`` and its descriptors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cushion_deploy.engines.external_data import _PARTS, external_locations, require_data_beside
from cushion_deploy.errors import UntrustedArtifact


def _tensor(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def _graph(**more: Any) -> onnx.GraphProto:
    out = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])
    return helper.make_graph(more.get("nodes", []), "g", [], [out], more.get("tensors", []))


def _everywhere() -> onnx.ModelProto:
    """Return a model with a tensor in every place that the format has for one."""
    deep = helper.make_node("If", ["c"], ["w"], then_branch=_graph(tensors=[_tensor("then")]))
    constant = helper.make_node("Constant", [], ["w"], value=_tensor("constant"))
    several = helper.make_node("Several", [], ["w"], tensors=[_tensor("first"), _tensor("second")])
    graphs = helper.make_node("Graphs", [], ["w"], graphs=[_graph(nodes=[deep]), _graph(tensors=[_tensor("third")])])
    sparse = onnx.SparseTensorProto(values=_tensor("values"), indices=_tensor("indices"), dims=[4])
    model = helper.make_model(_graph(nodes=[constant, several, graphs], tensors=[_tensor("initializer")]))
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.append(helper.make_node("Sparse", [], ["w"], value=sparse))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "inside"))
    training = model.training_info.add()
    training.initialization.CopyFrom(_graph(tensors=[_tensor("initialization")]))
    training.algorithm.CopyFrom(_graph(tensors=[_tensor("algorithm")]))
    function = model.functions.add(name="f", domain="d")
    function.node.append(helper.make_node("Constant", [], ["w"], value=_tensor("function")))
    function.attribute_proto.append(helper.make_attribute("default", _tensor("default")))
    return model


def test_tensors_are_found_in_every_place() -> None:
    names = "then constant first second third values indices initializer initialization algorithm function default"
    assert external_locations(_everywhere().SerializeToString()) == set(names.split())


def test_no_path_of_the_format_is_missing() -> None:
    wanted = {"StringStringEntryProto"}
    messages = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    expected: dict[str, dict[int, str]] = {}
    while True:  # messages that lead to external data, by fields that do
        found = {
            name: {
                field.number: field.message_type.name
                for field in message.fields
                if field.message_type is not None
                and field.message_type.name in wanted | set(expected)
                # Other entries of strings are metadata.
                and (field.message_type.name not in wanted or field.name == "external_data")
            }
            for name, message in messages.items()
        }
        found = {name: fields for name, fields in found.items() if fields}
        if found == expected:
            break
        expected = found
    assert expected == _PARTS


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "..\\secret", "C:secret", ".", "..", ""]
)
def test_another_place_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(helper.make_model(_graph(tensors=[_tensor(name)])).SerializeToString())
    with pytest.raises(UntrustedArtifact, match="not a file beside it"):
        require_data_beside(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.onnx.data", "...", "données"])
def test_a_file_beside_it_is_not(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(helper.make_model(_graph(tensors=[_tensor(name)])).SerializeToString())
    require_data_beside(tmp_path / "model.onnx")


def test_a_number_that_readers_cut_to_32_bits_hides_nothing() -> None:
    tensor = _tensor("hidden").SerializeToString()
    # The tag of field 5 plus 2**32, in five bytes more than its own: protobuf reads it as field 5.
    tag = bytes([5 << 3 | 2 | 128, 128, 128, 128, 16])
    graph = tag + bytes([len(tensor)]) + tensor
    with pytest.raises(ValueError, match="more than 32 bits"):
        external_locations(bytes([7 << 3 | 2, len(graph)]) + graph)


def test_a_graph_may_be_nested_more_deeply_than_python_recurses() -> None:
    def wrap(number: int, content: bytes) -> bytes:
        size, length = bytearray(), len(content)
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + content

    content = wrap(5, _tensor("deep").SerializeToString())
    for _ in range(3000):
        content = wrap(1, wrap(5, wrap(6, content)))
    assert external_locations(wrap(7, content)) == {"deep"}


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 400))
def test_bytes_that_are_no_model_are_at_most_refused(tmp_path_factory: Any, noise: bytes, at: int, cut: int) -> None:
    model = _everywhere().SerializeToString()
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    path.write_bytes(model[:at] + noise + model[at + cut :])
    try:
        require_data_beside(path)
    except UntrustedArtifact:
        return  # any other error fails the test
