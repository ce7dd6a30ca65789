"""The command of the vendor's own tool that builds the same plan, to reproduce one without this project."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.profiles import Shapes

_POINTS = ("min", "opt", "max")


def vendor_command(
    flavour: Flavour, graph: ExportedGraph, plan: str, targets: Sequence[str], profiles: Mapping[str, Shapes]
) -> str:
    """Return the command line of ``trtexec`` (standard TensorRT) or ``tensorrt_rtx`` that builds the same plan.

    Empty for a graph with a static cache: its attention is marked as decomposable and its memory as managed by the
    caller, and the tools have no option for either.

    Args:
        flavour: library whose tool is used.
        graph: graph to compile.
        plan: file name of the plan.
        targets: compute capabilities such as ``sm86``.
        profiles: shapes of each optimization profile, in order.
    """
    if graph.contract.cache_capacity:
        return ""
    parts = [
        flavour.tool,
        f"--onnx={graph.path.name}",
        f"--saveEngine={plan}",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    if flavour.ahead_of_time:
        # Its networks are always strongly typed.
        parts.append("--computeCapabilities=" + ",".join(target.removeprefix("sm") for target in targets))
    else:
        parts.append("--stronglyTyped")
    for index, shapes in enumerate(profiles.values()):
        parts.append(f"--profile={index}")
        for point, name in enumerate(_POINTS):
            listed = (f"{tensor}:{'x'.join(map(str, shape[point]))}" for tensor, shape in shapes.items())
            parts.append(f"--{name}Shapes={','.join(listed)}")
    return shlex.join(parts)
