"""The command of the vendor's own tool that builds the same plan, to try or report one without this project."""

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
    """Return the line of ``trtexec`` (standard TensorRT) or ``tensorrt_rtx`` that builds the same plan.

    Empty for a graph with a static cache: its attention is marked as one that may be decomposed, and its memory as the
    caller's, which no option of the tools does.

    Args:
        flavour: which tool.
        graph: what is compiled.
        plan: file name.
        targets: such as ``sm86``.
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
