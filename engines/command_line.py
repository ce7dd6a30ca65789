"""The command of the vendor's own tool that builds the same plan, to try or report one without this project."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from cushion_deploy.engines.flavours import Flavour
from cushion_deploy.engines.profiles import Shapes

_POINTS = ("min", "opt", "max")


def vendor_command(
    flavour: Flavour, onnx: str, plan: str, targets: Sequence[str], profiles: Mapping[str, Shapes]
) -> str:
    """Return the line of ``trtexec`` (standard TensorRT) or ``tensorrt_rtx`` that builds the same plan.

    Args:
        flavour: which tool.
        onnx, plan: file names.
        targets: such as ``sm86``.
        profiles: shapes of each optimization profile, in order.
    """
    parts = [flavour.tool, f"--onnx={onnx}", f"--saveEngine={plan}", "--profilingVerbosity=detailed", "--skipInference"]
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
