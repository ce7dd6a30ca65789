"""The library OpenVINO: importing it without its telemetry, its version, and the settings of every compilation."""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any

from cushion_deploy.dependencies import require_versions
from cushion_deploy.errors import MissingDependency, UsageError

NAME = "openvino"
"""Name of the engine, of the module and of the distribution."""
INSTALL = "pip install 'cushion-deploy[openvino]'"
DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"


@functools.cache
def import_openvino() -> Any:
    """Return the module; raises MissingDependency, with the install command, if it is not installed or too old.

    Importing it imports ``openvino_telemetry``, which its converter of models sends through. cushion-deploy does not
    convert, but a library that can send is not loaded here: OpenVINO works without that module and then uses a
    substitute that does nothing. A program that has imported it before keeps it.
    """
    require_versions("openvino")
    blocked = _TELEMETRY not in sys.modules
    if blocked:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        import openvino
    except (ImportError, OSError, RuntimeError) as e:
        raise MissingDependency(f"OpenVINO cannot be imported: {e}", hint=INSTALL) from e
    finally:
        if blocked:
            sys.modules.pop(_TELEMETRY, None)
    return openvino


@functools.cache
def core() -> Any:
    """Return the ``openvino.Core`` of this process."""
    return import_openvino().Core()


def installed_version() -> str:
    """Return the version of OpenVINO, without importing it; raises MissingDependency if it is not installed."""
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError as e:
        raise MissingDependency(f"engine '{NAME}' needs OpenVINO, which is not installed", hint=INSTALL) from e


def settings(threads: int | None = None) -> dict[str, Any]:
    """Return the properties of a compiled model.

    Args:
        threads: threads of the session; None for one per physical core.

    Raises:
        UsageError: a number of threads below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}", hint="give at least 1, or leave it out for one per core")
    return {
        # The default is bfloat16 on a processor with AMX, also where the graph is float32.
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "ACCURACY",
        # Defaults that quantize what the graph leaves in floating point: activations, and keys and values.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Softmax over masked positions produces subnormals.
        "CPU_DENORMALS_OPTIMIZATION": True,
        **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
    }


def reason(error: Exception) -> str:
    """Return the last line of an OpenVINO error, which says what is wrong; those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.300}"
