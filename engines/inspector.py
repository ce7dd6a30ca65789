"""Read the kernels of a plan off the engine inspector, which needs the device that the plan is for.

The JSON is that of ``get_engine_information`` of a plan built with detailed profiling. Versions spell the type of a
tensor in two ways, ``Datatype: Int8`` and ``Format/Datatype: Int8`` (in prose before 10: ``Row major Int8 format``);
all are read, and a layer that says less is refused: a report of half a plan would call anything INT8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cushion_deploy.engines.kernel_names import kernel_profiles, onnx_nodes
from cushion_deploy.engines.plan_report import Kernel, KernelTensor, PlanReport
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
"""Spellings of types, and the one that :class:`KernelTensor` uses."""
_WORD = re.compile(r"[A-Za-z]+\d*")


def read_inspection(text: str, profiles: int, version: str) -> PlanReport:
    """Parse the inspector's JSON.

    Args:
        text: of ``get_engine_information(LayerInformationFormat.JSON)``.
        profiles: optimization profiles of the plan.
        version: of the library that wrote it, for the error.

    Raises:
        CheckFailed: it is no such JSON, or a layer does not tell its kind and the types of its tensors.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise _unreadable("the whole text", f"no JSON object with Layers ({e})", version) from e
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "LayerType" in layer for layer in layers):
        # Plans that were built without detailed profiling list names alone.
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
    return Kernel(
        name=name,
        kind=str(layer["LayerType"]),
        tactic=str(layer.get("TacticName", "")),
        profile=profile,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=onnx_nodes(str(layer.get("Metadata", ""))),
    )


def _list(layer: Mapping[str, Any], part: str, name: str, version: str) -> Sequence[Any]:
    found = layer.get(part, [])
    if not isinstance(found, list):
        raise _unreadable(name, f"{part} is no list", version)
    return found


def _tensor(tensor: Any, name: str, version: str) -> KernelTensor:
    if not isinstance(tensor, dict):
        raise _unreadable(name, f"a tensor is {tensor!r:.60}", version)
    said = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    kind = next((_TYPES[word] for word in _WORD.findall(said) if word in _TYPES), None)
    if kind is None:
        raise _unreadable(name, f"type {said!r} of tensor {tensor.get('Name')!r}", version)
    dimensions = tensor.get("Dimensions", [])
    return KernelTensor(str(tensor.get("Name", "")), kind, tuple(int(d) for d in dimensions))


def _unreadable(where: str, found: str, version: str) -> CheckFailed:
    return CheckFailed(
        f"the engine inspector of TensorRT {version} cannot be read: {where}: {found}",
        hint="the INT8 coverage of this plan cannot be counted; report this with the version of TensorRT",
    )
