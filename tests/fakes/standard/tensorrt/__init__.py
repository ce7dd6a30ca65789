"""A stand-in for standard TensorRT 11, which PyPI alone does not provide: the parser and builder of TensorRT-RTX.

It differs as standard TensorRT does: it builds for the device of this machine and takes no list of targets, it holds a
plan in memory, and the plan opens on the device for the inspector. The JSON of the inspector is generated from the real
layer listing of the same build.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tensorrt_rtx as rtx
from tensorrt_rtx import (  # noqa: F401 - the module's own names
    BuilderFlag,
    IAttentionOutputLayer,
    IDequantizeLayer,
    ILogger,
    IMatrixMultiplyLayer,
    LayerInformationFormat,
    NetworkDefinitionCreationFlag,
    OnnxParser,
    ProfilingVerbosity,
)

__version__ = "11.0.0.99"

_TENSOR = re.compile(r"\{ Name: ([^{}]*?), (?:Location: \w+, )?Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
LISTINGS: list[str] = []


class Builder:
    """The builder, without what standard TensorRT lacks."""

    def __init__(self, logger: Any) -> None:
        class Listener(rtx.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if message.startswith("Layers:"):
                    LISTINGS.append(message)
                else:
                    logger.log(severity, message)

        self._listener = Listener()
        self._builder = rtx.Builder(self._listener)

    def create_network(self, flags: int) -> Any:
        return self._builder.create_network(flags)

    def create_optimization_profile(self) -> Any:
        return self._builder.create_optimization_profile()

    def create_builder_config(self) -> Any:
        config = self._builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        return config

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        return self._builder.build_serialized_network(network, config)


class Runtime:
    """Opens the plan that was just built."""

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, rtx.ILogger)

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        assert len(plan) > 1000
        return Engine()


class Engine:
    """The plan on the device."""

    def create_engine_inspector(self) -> Engine:
        return self

    def get_engine_information(self, form: Any) -> str:
        assert form == LayerInformationFormat.JSON
        lines = LISTINGS[-1].split("\n\n")[0].splitlines()[1:]
        return json.dumps({"Layers": [_layer(line) for line in lines], "Bindings": []})


def _layer(line: str) -> dict[str, Any]:
    parts = re.split(r", (LayerType|Inputs|Constants|Outputs|ParameterType|TacticName|Metadata): ", line)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    layer: dict[str, Any] = {"Name": parts[0].removeprefix("Name: "), "LayerType": found["LayerType"]}
    for part in ("Inputs", "Constants", "Outputs"):
        layer[part] = [
            {"Name": name, "Dimensions": [int(d) for d in dims.split(",") if d], "Format/Datatype": kind}
            for name, dims, kind in _TENSOR.findall(found.get(part, ""))
        ]
    layer["TacticName"] = found.get("TacticName", "").partition(",")[0]
    layer["Metadata"] = found.get("Metadata", "")
    return layer
