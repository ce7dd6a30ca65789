"""Find the first Site whose floating-point input differs between transformers and the float twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.parity.segments import add_output, edited_session, first_past, token_inputs

SiteInputs = Mapping[Site, FloatArray]
INPUT_DIFFERENCE = 1e-3
"""Largest allowed difference of a Site's input, relative to the Site's largest magnitude.

Rounding alone stays below 1e-5 in the tiny models of the tests; 1e-3 leaves room for the depth of real models.
"""


def twin_inputs(twin: ExportedGraph, sites: tuple[Site, ...], ids: IntArray) -> SiteInputs:
    """Return the MatMul input of every Site in the float twin, ``[1, n, features]``, for ids int64 ``[1, n]``."""
    session = edited_session(twin, lambda model: _add_outputs(model, sites), "fused")
    past = first_past(twin)
    feed = {**past, **token_inputs(ids, twin.contract.prefix_slots)}
    arrays = session.run([f"{site}.input" for site in sites], feed)
    return {site: array.reshape(1, ids.shape[1], -1) for site, array in zip(sites, arrays, strict=True)}


def first_differing_input(reference: SiteInputs, found: SiteInputs) -> Site | None:
    """Return the first Site of ``reference`` whose input differs in ``found``, as NaN always does; None for none."""
    for site, expected in reference.items():
        if not np.abs(found[site] - expected).max() <= INPUT_DIFFERENCE * np.abs(expected).max():
            return site
    return None


def _add_outputs(model: Any, sites: tuple[Site, ...]) -> None:
    """Add the MatMul input of every Site as a graph output ``<site>.input``."""
    linears = {node.inputs[1].name: node for node in model.graph if node.op_type == "MatMul"}
    # A head with tied weights is the only Gemm of the graph: it multiplies by the embedding.
    gemms = [node for node in model.graph if node.op_type == "Gemm"]
    for site in sites:
        node = gemms[0] if site == HEAD_SITE and gemms else linears[f"{site}.weight"]
        add_output(model, node.inputs[0], site)
