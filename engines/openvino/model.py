"""From model.onnx to a compiled model: the head's first token becomes an input, the caches become states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.session import INPUTS, past_names
from cushion_deploy.engines.external_data import require_data_beside
from cushion_deploy.engines.openvino.library import DEVICE, core, import_openvino, reason, settings
from cushion_deploy.errors import UntrustedArtifact, UsageError

LOGITS_START = "logits_start"
"""Initializer of a graph, int64 ``[1]``, that a caller may override: the head is computed from this token on."""
_REBUILD = "run `cushion-deploy verify` on the bundle; if it is intact, build it again"


def compile_graph(graph: ExportedGraph, threads: int | None = None) -> Any:
    """Return the ``openvino.CompiledModel`` of a graph, with states in place of the inputs and outputs of its cache.

    Raises:
        MissingDependency: OpenVINO is not installed.
        UsageError: the file does not exist.
        UntrustedArtifact: the file is not a graph, not the one that the contract describes, or it reads tensors from
            elsewhere.
    """
    if not graph.path.is_file():
        raise UsageError(f"{graph.path} does not exist", hint="give the .onnx file of a bundle")
    require_data_beside(graph.path)
    try:
        model = core().read_model(graph.path)
        _require_contract(model, graph.contract, graph.path)
        _override_logits_start(model)
        _keep_cache_in_states(model, graph.contract)
        return core().compile_model(model, DEVICE, settings(threads))
    except RuntimeError as e:
        raise UntrustedArtifact(f"OpenVINO cannot load {graph.path}: {reason(e)}", hint=_REBUILD) from e


def import_blob(blob: bytes, threads: int | None = None) -> Any:
    """Return the ``openvino.CompiledModel`` that a blob was exported from.

    Args:
        blob: bytes whose digest has been verified.
        threads: threads of the session.

    Raises:
        UntrustedArtifact: OpenVINO refuses the blob.
    """
    # Copied once, because OpenVINO shares no memory that is read-only; weights then stay where this tensor has them.
    tensor = import_openvino().Tensor(np.frombuffer(blob, dtype=np.uint8))
    try:
        return core().import_model(tensor, DEVICE, settings(threads))
    except RuntimeError as e:
        hint = "compile it again with `cushion-deploy engine BUNDLE --engine openvino -o BUNDLE`"
        raise UntrustedArtifact(f"OpenVINO cannot read the blob of the bundle: {reason(e)}", hint=hint) from e


def state_names(contract: GraphContract) -> list[str]:
    """Return the names of the states, in the order of :func:`~cushion_deploy.core.session.past_names`."""
    return [past + _present(past) for past in past_names(contract)]


def name_of(port: Any) -> str:
    """Return the name of an input or output in the graph.

    OpenVINO may add that of the node behind it, such as ``head/Gemm_2316`` beside ``logits``; ours have no slash.
    """
    return min(port.names, key=lambda name: ("/" in name, name), default="")


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def _require_contract(model: Any, contract: GraphContract, path: Path) -> None:
    element = {"float32": "f32", "int8": "i8"}.get(contract.cache_dtype, contract.cache_dtype)
    past = f"{element} [?,{contract.num_kv_heads},?,{contract.head_dim}]"
    expected = {**dict.fromkeys(past_names(contract), past), **dict.fromkeys(INPUTS, "i64 [?,?]")}
    found = {name_of(port): _described(port) for port in model.inputs}
    wanted = {**{_present(name): past for name in past_names(contract)}, "logits": contract.vocab_size}
    outputs = {name_of(port): _described(port) for port in model.outputs}
    if "logits" in outputs:
        outputs["logits"] = model.output("logits").get_partial_shape()[2].get_length()
    for described, needed in ((found, expected), (outputs, wanted)):
        differing = [name for name in sorted({*described, *needed}) if described.get(name) != needed.get(name)]
        if differing:
            name = differing[0]
            raise UntrustedArtifact(
                f"{path} is not the graph that its contract describes: {name} is {described.get(name)}, "
                f"expected {needed.get(name)}",
                hint="build the bundle again",
            )


def _described(port: Any) -> str:
    """Return type and shape of an input or output, such as ``f32 [?,3,?,64]``."""
    return f"{port.get_element_type().get_type_name()} {str(port.get_partial_shape()).replace(' ', '')}"


def _override_logits_start(model: Any) -> None:
    """Turn the initializer ``logits_start``, which OpenVINO reads as a constant, into an input."""
    ov = import_openvino()
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() == LOGITS_START:
            given = ov.opset13.parameter(list(node.output(0).get_shape()), np.int64, name=LOGITS_START)
            node.output(0).replace(given.output(0))
            given.output(0).get_tensor().set_names({LOGITS_START})
            model.add_parameters([given])
            return


def _keep_cache_in_states(model: Any, contract: GraphContract) -> None:
    from openvino.passes import MakeStateful, Manager

    manager = Manager()
    manager.register_pass(MakeStateful({past: _present(past) for past in past_names(contract)}))
    manager.run_passes(model)
