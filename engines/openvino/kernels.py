"""Whether the integer kernels of OpenVINO are exact on this processor: tried, not looked up.

OpenVINO multiplies int8 by int8, or uint8 by int8. On x86 without VNNI it adds pairs of products in 16 bits, which
saturate without any message, and it has no setting for exact sums. There is no way around it, so the engine is refused.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.engines.extreme_codes import extreme_products, extreme_weights, is_exact
from cushion_deploy.engines.one_linear import one_linear
from cushion_deploy.engines.openvino.library import DEVICE, core, reason, settings
from cushion_deploy.errors import MissingDependency

REQUIREMENTS = "RUNTIME_REQUIREMENTS"
"""Property of a compiled model: the version of OpenVINO and the instruction set that its blob needs, as one text."""


@dataclass(frozen=True)
class Machine:
    """What a compiled linear shows of this machine.

    Attributes:
        requirements: what a blob that is compiled here needs, see :data:`REQUIREMENTS`.
        exact: whether integer sums are exact.
    """

    requirements: str
    exact: bool


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Compile and run one linear of extreme codes; once per process, some tens of milliseconds.

    Raises:
        MissingDependency: OpenVINO is not installed, or does not run on this processor.
    """
    try:
        return _this_machine()
    except RuntimeError as e:
        hint = "install openvino again, or run --engine onnxruntime"
        raise MissingDependency(f"OpenVINO does not run a linear on this machine: {reason(e)}", hint=hint) from e


def _this_machine() -> Machine:
    weights = extreme_weights()
    model = core().read_model(io.BytesIO(one_linear(weights)))
    compiled = core().compile_model(model, DEVICE, settings(1))
    request = compiled.create_infer_request()

    def multiply(codes: FloatArray) -> FloatArray:
        found: FloatArray = request.infer({"x": codes})["y"]
        return found

    exact = all(is_exact(codes, weights, found) for codes, found in extreme_products(multiply))
    return Machine(str(compiled.get_property(REQUIREMENTS)), exact)


def require_exact() -> None:
    """Check that integer sums are exact on this processor.

    Raises:
        MissingDependency: OpenVINO is not installed, or the processor has no integer kernel that is exact.
    """
    machine = this_machine()
    if not machine.exact:
        raise MissingDependency(
            f"OpenVINO adds products of INT8 codes with saturation on this processor ({instruction_set(machine)})",
            hint="use a processor with VNNI or AMX, or --engine onnxruntime, which has exact kernels here too",
        )


def instruction_set(machine: Machine) -> str:
    """Return the instruction set in the requirements of a machine; the whole text if it is in another form."""
    parts: dict[str, Any] = dict(part.partition("=")[::2] for part in machine.requirements.split(";"))
    return str(parts.get("isa", machine.requirements))
