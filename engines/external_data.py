"""Which files the tensors of an ONNX graph read; only reading their values needs the package ``onnx_ir``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact

_PARTS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Fields of ``onnx.proto`` that lead to the external data of a tensor, by message and field number."""
_ENTRY = "StringStringEntryProto"
_FIXED = {1: 8, 5: 4}
"""Bytes of a field by its wire type, where they are fixed."""


def require_data_beside(path: Path) -> None:
    """Require that every tensor of a graph is stored in it or in a file beside it.

    ONNX Runtime has done so itself only since version 1.25.

    Raises:
        UntrustedArtifact: a tensor is read from somewhere else, or the file is missing or not a graph.
    """
    hint = "do not use it unless you know who made it; run `cushion-deploy verify` on the bundle"
    try:
        locations = external_locations(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UntrustedArtifact(f"{path} cannot be read as an ONNX graph: {e}", hint=hint) from e
    for name in sorted(locations):
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise UntrustedArtifact(f"{path} reads tensors from {name!r}, which is not a file beside it", hint=hint)


def read_graph(path: Path) -> Any:
    """Return a graph (``onnx_ir.Model``) whose values are to be read, not saved.

    onnx_ir refuses to read files that are symbolic links, as in a snapshot of the hub, or have a second hard link, as
    in a copy by ``cp -l``: it cannot know that the digest of what a link leads to was verified.

    Raises:
        UntrustedArtifact: see :func:`require_data_beside`.
    """
    import onnx_ir as ir

    require_data_beside(path)
    model = ir.load(path)
    for value in model.graph.initializers.values():
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor):
            # Without a base directory, the caller vouches for the location.
            data = path.parent.absolute() / stored.location
            value.const_value = ir.ExternalTensor(
                data, stored.offset, stored.length, stored.dtype, shape=stored.shape, name=stored.name
            )
    return model


def external_locations(model: bytes) -> set[str]:
    """Return the locations of the external data of all tensors of a serialized model, those of subgraphs included.

    Raises:
        ValueError: the bytes are not a serialized model, or a location is not UTF-8.
    """
    found, view = set[str](), memoryview(model)
    # A list, not recursion: a forged graph may be nested as deeply as it is long.
    pending = [("ModelProto", view)]
    while pending:
        message, content = pending.pop()
        if message == _ENTRY:
            entry = {number: bytes(value) for number, value in _fields(content)}
            if entry.get(1) == b"location":
                found.add(entry.get(2, b"").decode())
            continue
        parts = _PARTS[message]
        pending += [(parts[number], value) for number, value in _fields(content) if number in parts]
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and content of those fields of a message that are strings or messages."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag >> 32:  # readers differ in what they make of it
            raise ValueError("a field has a number of more than 32 bits")
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _varint(message, at)
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if at + size > len(message):
            raise ValueError("a field is longer than its message")
        if kind == 2:
            yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return an integer of at most 64 bits, and where it ends."""
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        found |= (byte & 127) << shift
        if byte < 128:
            return found, at
    raise ValueError("a number is longer than ten bytes")
