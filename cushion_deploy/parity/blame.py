"""Name the first Site whose floating-point input differs between transformers and the float twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.parity.segments import edited_session, first_past, show_input, token_inputs

SiteInputs = Mapping[Site, FloatArray]
INPUT_DIFFERENCE = 1e-3
"""Largest difference of a Site's input, as a share of the Site's largest magnitude.

Rounding alone stays below 1e-5 of it in the tiny models of the tests; 1e-3 leaves room for the depth of real ones.
"""


def twin_inputs(twin: ExportedGraph, sites: tuple[Site, ...], ids: IntArray) -> SiteInputs:
    """Return what enters the MatMul of every Site in the float twin, ``[1, n, features]``; ids int64 ``[1, n]``."""
    session = edited_session(twin, lambda model: _show(model, sites), "fused")
    past = first_past(twin)
    feed = {**past, **token_inputs(ids, twin.contract.prefix_slots)}
    arrays = session.run([f"{site}.input" for site in sites], feed)
    return {site: array.reshape(1, ids.shape[1], -1) for site, array in zip(sites, arrays, strict=True)}


def first_differing_input(reference: SiteInputs, found: SiteInputs) -> Site | None:
    """Return the first Site of ``reference`` whose input is not the same in ``found``; NaN is never the same."""
    for site, expected in reference.items():
        if not np.abs(found[site] - expected).max() <= INPUT_DIFFERENCE * np.abs(expected).max():
            return site
    return None


def _show(model: Any, sites: tuple[Site, ...]) -> None:
    """Show the input of every Site's MatMul as the graph output ``<site>.input``."""
    linears = {node.inputs[1].name: node for node in model.graph if node.op_type == "MatMul"}
    # The head of a model with tied weights multiplies by the embedding: the one Gemm of the graph.
    gemms = [node for node in model.graph if node.op_type == "Gemm"]
    for site in sites:
        node = gemms[0] if site == HEAD_SITE and gemms else linears[f"{site}.weight"]
        show_input(model, node.inputs[0], site)
