"""Compare the scales and weights stored in a quantized graph with those it was exported from, bit for bit.

Nothing is run. In a run, a wrong activation scale only shows at the next Site; this check names its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales, kv_site
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.external_data import read_graph
from cushion_deploy.parity.checks import ParityCheck

LinearWeights = tuple[Site, Int8Array, FloatArray]
Table = tuple[Int8Array, FloatArray]
"""Codes of an embedding, int8 ``[vocab, hidden]``, and the scales of its blocks, float32 ``[vocab, blocks]``."""


def scale_rung(rung: str, graph: ExportedGraph, scales: ActivationScales) -> list[ParityCheck]:
    """Compare the scales of the Q and DQ nodes of every Site with ``scales``; no float32 bit may differ."""
    nodes = {node.outputs[0].name: node for node in read_graph(graph.path).graph if node.op_type == "QuantizeLinear"}
    differing = []
    for site in graph.sites:
        expected = np.float32(scales.scales[site]).tobytes()
        q = nodes.get(f"{site}.codes")
        users = [q, *(node for node, _ in q.outputs[0].uses())] if q else []
        if len(users) < 2 or any(_bytes(node.inputs[1]) != expected for node in users):
            differing.append(site)
    return [_count(rung, "Sites whose scale differs", differing, len(graph.sites), "Sites")]


def cache_scale_rung(rung: str, graph: ExportedGraph, kv: KvScales) -> list[ParityCheck]:
    """Compare the scales of the Q and DQ nodes of an INT8 cache with ``kv``; no float32 bit may differ.

    A per-tensor scale is one number in the graph and is repeated for each head in ``kv``.
    """
    nodes = {node.outputs[0].name: node for node in read_graph(graph.path).graph if node.op_type == "QuantizeLinear"}
    differing = []
    for layer, part, scales in kv.rows():
        q = nodes.get(f"{kv_site(layer, part)}.codes")
        expected = scales[0] if kv.granularity == "per-tensor" else scales
        # Q, and its DQ after the Concat with the past and possibly a Transpose.
        users = [q, *_readers(q)] if q else []
        if len(users) < 2 or any(_bytes(node.inputs[1]) != expected.tobytes() for node in users):
            differing.append(kv_site(layer, part))
    return [_count(rung, "parts of the cache whose scale differs", differing, 2 * len(kv.keys), "parts")]


def _readers(q: Any) -> list[Any]:
    """Return the nodes that read the ``present`` output that a Q node is concatenated into."""
    present = [join.outputs[0] for join, _ in q.outputs[0].uses()]
    found = [reader for value in present for reader, _ in value.uses()]
    transposed = [reader for node in found if node.op_type == "Transpose" for reader, _ in node.outputs[0].uses()]
    return [*(node for node in found if node.op_type != "Transpose"), *transposed]


def weight_rung(rung: str, graph: ExportedGraph, weights: Iterable[LinearWeights]) -> list[ParityCheck]:
    """Compare the INT8 codes and scales of every linear with ``weights``; none may differ.

    Args:
        rung: name of the rung.
        graph: the quantized graph, in which the linears of one Site are packed in order.
        weights: for each linear its Site, codes int8 ``[out, in]`` and scales float32 ``[out]``, in the same order.
    """
    stored, differing, begin, total = read_graph(graph.path).graph.initializers, [], dict.fromkeys(graph.sites, 0), 0
    for site, codes, scale in weights:
        total += 1
        columns = slice(begin[site], begin[site] + len(scale))
        begin[site] = columns.stop
        found_codes, found_scales = (_array(stored.get(f"{site}.{part}")) for part in ("weight_codes", "weight_scales"))
        if not np.array_equal(found_codes[..., columns], codes.T) or not np.array_equal(found_scales[columns], scale):
            differing.append(site)
    return [_count(rung, "linears whose INT8 weight differs", differing, total, "linears")]


def embedding_rung(rung: str, graph: ExportedGraph, table: Table) -> list[ParityCheck]:
    """Compare the INT8 codes and scales of every row of the token embedding with ``table``; none may differ."""
    codes, scales = _table(read_graph(graph.path))
    expected_codes, expected_scales = table
    if codes.shape == expected_codes.shape and scales.shape == expected_scales.shape:
        differing = (codes != expected_codes).any(axis=1) | (scales != expected_scales).any(axis=1)
        count, first = int(differing.sum()), int(differing.argmax())
    else:
        count, first = len(expected_codes), 0
    note = f"{len(expected_codes)} rows compared bit for bit"
    if count:
        note = f"first differing row: {first}; {note}"
    return [ParityCheck(rung, "rows of the embedding that differ", count, 0, "at most", note=note)]


def _table(model: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return codes and scales that the token ids gather; empty arrays if the embedding has no codes."""
    values = [user.inputs[0] for user, _ in model.graph.inputs[0].uses() if user.op_type == "Gather"]
    arrays = list(map(_array, values))
    codes = next((array for array in arrays if array.dtype == np.int8), np.zeros(0))
    # Scales may be stored as float16, which changes none.
    scales = next((array.astype(np.float32) for array in arrays if array.dtype != np.int8), np.zeros(0))
    return codes, scales


def _count(rung: str, metric: str, differing: list[Site], total: int, unit: str) -> ParityCheck:
    blamed = differing[0] if differing else None
    note = f"{total} {unit} compared bit for bit"
    if blamed:
        note = f"first diverging Site: {blamed}; {note}"
    return ParityCheck(rung, metric, len(differing), 0, "at most", blamed, note)


def _array(value: Any) -> npt.NDArray[Any]:
    """Return the constant of a value; an empty array, equal to no constant, if it has none."""
    tensor = value.const_value if value is not None else None
    return np.zeros(0) if tensor is None else tensor.numpy()


def _bytes(value: Any) -> bytes:
    array = _array(value)
    return array.tobytes() if array.dtype == np.float32 else b""
