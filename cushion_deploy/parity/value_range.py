"""Measure the largest values of a 16-bit graph on text, as float32 computes them: does the graph fit its type?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import Dtype, FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.core.value_range import LargestValue
from cushion_deploy.parity.rounding import MOVES, narrow_nodes
from cushion_deploy.parity.segments import as_run, edited_session, first_past, token_inputs

PIECE = 128
"""Tokens in one run; bounds the memory of logits and attention scores."""
LARGEST = "/largest"
"""Suffix of the outputs that are measured."""
HEAD = "head/"
"""Scope of the head in a graph."""
BOUNDED = frozenset(("Erf", "Sigmoid", "Softmax", "Tanh"))
"""Operators whose results are at most 1."""
SATURATING = frozenset(("Erf", "Sigmoid", "Tanh"))
"""Operators with the same result for an infinite input as for any large one."""


@dataclass(frozen=True)
class Found:
    """The largest value of one operator: its magnitude, and the window and position of the token."""

    value: float
    window: int
    position: int


def largest_values(
    graph: ExportedGraph,
    windows: Sequence[IntArray],
    token_text: Callable[[int], str],
    progress: Progress = silent,
) -> tuple[LargestValue, ...]:
    """Return the largest value in each part of a graph over windows of text, each behind the prefix of the graph.

    Every value that has the type of the graph is measured, but for those that cannot overflow (results of a softmax),
    that may (the argument of a tanh), and masked scores. The head runs for one token in 128: of a large vocabulary it
    would be most of the work, and logits are small.

    Args:
        graph: a 16-bit graph with a cache that grows.
        windows: token ids int64 ``[length]`` of each window, without padding.
        token_text: returns the text of a token.
        progress: where to report the number of windows done.
    """
    with elapsed(progress, "opening the graph to measure"):
        session = edited_session(graph, lambda model: _add_largest(model, graph.contract.dtype), "fused", rounded=False)
    found: dict[str, Found] = {}
    for number, ids in enumerate(windows):
        for name, rows, start in _pieces(session, graph, ids):
            # Rows are tokens, or heads or groups of heads with all tokens in each.
            length = min(PIECE, len(ids) - start)
            first = start + length - 1 if name.startswith(HEAD) else start
            flat = np.where(np.isfinite(rows), rows, np.float32(np.inf)).reshape(-1)
            index = int(flat.argmax())
            if name not in found or flat[index] > found[name].value:
                found[name] = Found(float(flat[index]), number, first + index % length)
        progress("measuring the range of values", number + 1, len(windows))
    return _by_part(found, windows, token_text)


def _pieces(session: Any, graph: ExportedGraph, ids: IntArray) -> Iterator[tuple[str, FloatArray, int]]:
    """Yield for every piece of a window the name of each measured value, its largest magnitudes and the first token."""
    names = [output.name for output in session.get_outputs() if output.name != "logits"]
    past = {name: as_run(value) for name, value in first_past(graph).items()}
    for start in range(0, len(ids), PIECE):
        piece = ids[None, start : start + PIECE]
        before = next(iter(past.values())).shape[2]
        out = dict(zip(names, session.run(names, {**past, **token_inputs(piece, before)}), strict=True))
        for name in [name for name in names if name.endswith(LARGEST)]:
            yield name.removesuffix(LARGEST), out.pop(name), start
        past = {name.replace("present", "past_key_values"): value for name, value in out.items()}


def _by_part(
    found: dict[str, Found], windows: Sequence[IntArray], token_text: Callable[[int], str]
) -> tuple[LargestValue, ...]:
    """Return the largest value of each scope of the graph, in order of computation."""
    parts: dict[str, tuple[str, Found]] = {}
    for name, each in found.items():
        part, _, operator = name.partition("/")
        if part not in parts or not each.value <= parts[part][1].value:
            parts[part] = operator.rpartition("_")[0], each
    rows = []
    for part, (operator, each) in parts.items():
        token = int(windows[each.window][each.position])
        rows.append(LargestValue(part, operator, each.value, token_text(token), token, each.position))
    return tuple(rows)


def _add_largest(model: Any, dtype: Dtype) -> None:
    """Add the largest magnitude in each row of every measured value as an output of a graph (``onnx_ir.Model``)."""
    import onnx_ir as ir

    graph, nodes, element = model.graph, narrow_nodes(model, dtype), ir.DataType[dtype.upper()]
    harmless = _harmless(nodes)
    _run_head_for_last_token(model)
    blocks = _constant(graph, "measured_blocks", [0, 0, -1])
    last = _constant(graph, "measured_axis", [-1]) if model.opset_imports[""] >= 18 else None
    for node in nodes:
        value = node.outputs[0]
        if node.op_type in MOVES | BOUNDED or value in harmless or _is_masked(value):
            continue
        # The blocks of a rotated token become one row.
        rotated = str(node.name).rpartition("/")[2].startswith("rotate")
        rows = [ir.node("Reshape", [value, blocks])] if rotated else []
        magnitude = ir.node("Abs", rows[0].outputs if rows else [value])
        axes = {} if last is not None else {"axes": [-1]}
        largest = ir.node(
            "ReduceMax", [magnitude.outputs[0], *([last] if last is not None else [])], {**axes, "keepdims": 0}
        )
        largest.outputs[0].name, largest.outputs[0].type = f"{value.name}{LARGEST}", ir.TensorType(element)
        graph.extend([*rows, magnitude, largest])
        graph.outputs.append(largest.outputs[0])


def _run_head_for_last_token(model: Any) -> None:
    """Let the head of a graph read the hidden states ``[1, n, hidden]`` of the last token of a run alone."""
    import onnx_ir as ir

    graph = model.graph
    head = [node for node in graph if str(node.name).startswith(HEAD)]
    (hidden,) = {v for n in head for v in n.inputs if v.producer() is not None and v.producer() not in head}
    limits = (("last", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))
    last = ir.node("Slice", [hidden, *(_constant(graph, f"measured_slice_{name}", [value]) for name, value in limits)])
    for node in head:
        for i, value in enumerate(node.inputs):
            if value is hidden:
                node.replace_input_with(i, last.outputs[0])
    graph.insert_before(head[0], last)


def _constant(graph: Any, name: str, values: Sequence[int]) -> Any:
    """Return a new initializer, int64 ``[n]``, of an ``onnx_ir.Graph``."""
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, dtype=np.int64), name=name))
    graph.register_initializer(value)
    return value


def _harmless(nodes: Sequence[Any]) -> set[Any]:
    """Return the values that are read by saturating operators alone, or only on the way to them: overflow is no error.

    So are the cube inside of GELU, and scores and logits before their soft cap.
    """
    found: set[Any] = set()
    for node in reversed(nodes):
        readers = [use.node for use in node.outputs[0].uses()]
        passed = (
            reader.op_type in SATURATING
            or (reader.op_type in ("Add", "Mul", "Div", "Reshape") and reader.outputs[0] in found)
            for reader in readers
        )
        if readers and not node.outputs[0].is_graph_output() and all(passed):
            found.add(node.outputs[0])
    return found


def _is_masked(value: Any) -> bool:
    """Whether a value is scores with the additive mask: only a softmax reads it, and masked scores are large."""
    return {use.node.op_type for use in value.uses()} == {"Softmax"}
