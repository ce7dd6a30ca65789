"""Rule sites-exactly: every given Site and part of the INT8 cache has a Q, and nothing else has one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cushion_deploy.core.sites import Site
from cushion_deploy.export.linear import codes_name
from cushion_deploy.export.rules.base import Rule, Violation
from cushion_deploy.export.rules.quantized_graph import Q, QuantizedGraph, name_of


def _subjects(graph: QuantizedGraph) -> list[ir.Node | Site]:
    return [*graph.of(Q), *sorted(graph.sites | graph.cache, key=codes_name)]


def _check(graph: QuantizedGraph, subject: ir.Node | Site) -> Iterator[Violation]:
    if isinstance(subject, ir.Node):
        name = subject.outputs[0].name or ""
        if name not in map(codes_name, graph.sites | graph.cache):
            found = f"quantizes to '{name}', which is no Site's tensor"
            yield Violation(name_of(subject), found, "quantize at Sites only")
    elif codes_name(subject) not in graph.quantized_names:
        found = f"has no {Q} writing '{codes_name(subject)}'"
        yield Violation(f"Site {subject}", found, "add Q and DQ before its MatMul")


SITES_EXACTLY = Rule("sites-exactly", _subjects, _check)
