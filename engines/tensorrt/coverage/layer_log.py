"""Read the kernels of a plan from the build log of TensorRT-RTX, which needs no device.

The listing is the log message that starts with ``Layers:``. Its format is undocumented, so this parser is written for
one version, and a line that it cannot parse is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cushion_deploy.engines.tensorrt.coverage.kernel_names import kernel_profiles, onnx_nodes
from cushion_deploy.engines.tensorrt.coverage.plan_report import Kernel, KernelTensor, PlanReport
from cushion_deploy.errors import CheckFailed

SUPPORTED_VERSION = "1.7.1"

_TENSOR = re.compile(
    r"\{ Name: (?P<name>[^{}]*?), (?:Location: \w+, )?Dimensions: \[(?P<dimensions>[-\d,]*)\], "
    r"(?:Strides: \[[-\d,]*\], StrideOrder: \[[\d,]*\], )?Datatype: (?P<dtype>\w+), Format: [^{}]* \}"
)
_TENSORS = r"\[(?: \{ [^{}]* \}(?:, \{ [^{}]* \})*)?\]"
_KERNEL = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), "
    rf"Inputs: (?P<inputs>{_TENSORS}), (?:Constants: (?P<constants>{_TENSORS}), )?Outputs: (?P<outputs>{_TENSORS})"
    r"(?P<fields>(?:, \w+: (?:\[[^\]]*\]|[^,\[]*))*), Metadata: (?P<metadata>(?:\x1f?\[ONNX Layer: [^\]]*\])*)"
)
_TACTIC = re.compile(r", TacticName: ([^,\[]*)")


def read_plan(listing: str, version: str) -> PlanReport:
    """Parse the builder's ``Layers:`` message.

    Args:
        listing: the whole message.
        version: version of the library, for the error message.

    Raises:
        CheckFailed: a line cannot be parsed, or a section of the supported version is missing.
    """
    lines = listing.split("\n")
    if lines[0] != "Layers:":
        raise _unreadable(1, lines[0], version)
    end = next((i for i, line in enumerate(lines) if not line), len(lines))
    rows = [_match(number, line, version) for number, line in enumerate(lines[1:end], start=2)]
    served = kernel_profiles([(row["name"], row.string) for row in rows])
    kernels = tuple(
        _kernel(row, profile, number, version)
        for number, (row, profile) in enumerate(zip(rows, served, strict=True), 2)
    )
    return PlanReport(kernels, _num_profiles(lines[end:], end, version))


def _match(number: int, line: str, version: str) -> re.Match[str]:
    found = _KERNEL.fullmatch(line)
    if found is None:
        raise _unreadable(number, line, version)
    return found


def _kernel(row: re.Match[str], profile: int, number: int, version: str) -> Kernel:
    tactic = _TACTIC.search(row["fields"])
    inputs, constants, outputs = (
        _tensors(row[part] or "", number, row.string, version) for part in ("inputs", "constants", "outputs")
    )
    return Kernel(
        name=row["name"],
        kind=row["kind"],
        tactic=tactic[1] if tactic else "",
        profile=profile,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=onnx_nodes(row["metadata"]),
    )


def _tensors(text: str, number: int, line: str, version: str) -> tuple[KernelTensor, ...]:
    found = tuple(
        KernelTensor(t["name"], t["dtype"], tuple(int(d) for d in t["dimensions"].split(",") if d))
        for t in _TENSOR.finditer(text)
    )
    if len(found) != text.count("{"):
        raise _unreadable(number, line, version)
    return found


def _num_profiles(lines: Sequence[str], offset: int, version: str) -> int:
    """Return the number of profiles: the entries of ``ProfileInfo`` of the first input or output."""
    for number, line in enumerate(lines, start=offset + 1):
        if line.startswith(" Name: "):
            _, separator, entries = line.partition(", ProfileInfo: [")
            if not separator or "{" not in entries:
                raise _unreadable(number, line, version)
            return entries.count("{")
    raise _unreadable(offset + 1, "(no section 'I/O Tensors')", version)


def _unreadable(number: int, line: str, version: str) -> CheckFailed:
    return CheckFailed(
        f"line {number} of the layer listing of TensorRT-RTX {version} cannot be read: {line[:300]!r}",
        hint=f"only the listing of version {SUPPORTED_VERSION} is supported; "
        f"install it with pip install 'tensorrt-rtx-cu13=={SUPPORTED_VERSION}.*'",
    )
