"""Read the kernels of a plan from the engine inspector, which needs the device that the plan is for.

The JSON is that of ``get_engine_information`` for a plan built with detailed profiling. Versions write the type of a
tensor differently: ``Datatype`` or ``DataType: Int8``, ``Format/Datatype: Int8``, before 10 in prose (``Row major Int8
format``). For tensors of dynamic shape some kernels give only ``N/A due to dynamic shapes``: then the type is unknown,
and never counts as INT8. A matrix product of the graph with operands of unknown type is an error, because it could be
counted neither as INT8 nor as a fallback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cushion_deploy.engines.tensorrt.coverage.kernel_names import kernel_profiles, onnx_nodes
from cushion_deploy.engines.tensorrt.coverage.plan_report import Kernel, KernelTensor, PlanReport
from cushion_deploy.errors import CheckFailed

_TYPES = {
    "FP32": "Float",
    "Float": "Float",
    "FP16": "Half",
    "Half": "Half",
    "BFloat16": "BFloat16",
    "BF16": "BFloat16",
    "Int8": "Int8",
    "INT8": "Int8",
    "Int32": "Int32",
    "INT32": "Int32",
    "Int64": "Int64",
    "INT64": "Int64",
    "Bool": "Bool",
    "BOOL": "Bool",
    "UInt8": "UInt8",
    "FP8": "FP8",
}
"""Spellings of types, to the spelling in :class:`KernelTensor`."""
UNKNOWN = "Unknown"
_KEYS = ("datatype", "format/datatype")
_WORD = re.compile(r"[A-Za-z]+\d*")


def read_inspection(text: str, profiles: int, version: str) -> PlanReport:
    """Parse the JSON of the engine inspector.

    Args:
        text: result of ``get_engine_information(LayerInformationFormat.JSON)``.
        profiles: number of optimization profiles of the plan.
        version: version of the library, for the error message.

    Raises:
        CheckFailed: it is not such JSON, or a layer lacks its type or the types of its tensors.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise _unreadable("the whole text", f"no JSON object with Layers ({e})", version) from e
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "LayerType" in layer for layer in layers):
        # A plan that was built without detailed profiling lists names only.
        raise _unreadable("Layers", "names without details", version)
    served = kernel_profiles([(str(layer.get("Name", "")), json.dumps(layer)) for layer in layers])
    kernels = tuple(_kernel(layer, profile, version) for layer, profile in zip(layers, served, strict=True))
    if not kernels or max(served) >= profiles:
        raise _unreadable("Layers", f"kernels of profile {max(served, default=-1)} in a plan of {profiles}", version)
    return PlanReport(kernels, profiles)


def _kernel(layer: Mapping[str, Any], profile: int, version: str) -> Kernel:
    name = str(layer.get("Name", ""))
    inputs, constants, outputs = (
        tuple(_tensor(tensor, name, version) for tensor in _list(layer, part, name, version))
        for part in ("Inputs", "Constants", "Outputs")
    )
    kernel = Kernel(
        name=name,
        kind=str(layer["LayerType"]),
        tactic=str(layer.get("TacticName", "")),
        profile=profile,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=onnx_nodes(str(layer.get("Metadata", ""))),
    )
    if kernel.is_gemm and kernel.nodes and any(operand.dtype == UNKNOWN for operand in kernel.operands):
        raise _unreadable(name, "a matrix product without the types of its operands", version)
    return kernel


def _list(layer: Mapping[str, Any], part: str, name: str, version: str) -> Sequence[Any]:
    found = layer.get(part, [])
    if not isinstance(found, list):
        raise _unreadable(name, f"{part} is not a list", version)
    return found


def _tensor(tensor: Any, name: str, version: str) -> KernelTensor:
    if not isinstance(tensor, dict):
        raise _unreadable(name, f"a tensor is {tensor!r:.60}", version)
    spelled = {key.lower(): value for key, value in tensor.items()}
    text = " ".join(str(spelled[key]) for key in _KEYS if spelled.get(key))
    kind = next((_TYPES[word] for word in _WORD.findall(text) if word in _TYPES), UNKNOWN)
    dimensions = spelled.get("dimensions")
    sizes = dimensions if isinstance(dimensions, list) and all(isinstance(d, int) for d in dimensions) else []
    return KernelTensor(str(tensor.get("Name", "")), kind, tuple(sizes))


def _unreadable(where: str, found: str, version: str) -> CheckFailed:
    return CheckFailed(
        f"the engine inspector of TensorRT {version} cannot be read: {where}: {found}",
        hint="the INT8 coverage of this plan cannot be counted; report this with the version of TensorRT",
    )
