"""Both ends of the child process that drives TensorRT-RTX: parse an ONNX file, build one plan, tell what was made.

It runs apart from the tool because a fault of a native library ends a process, and because a build inside native
code hears no Ctrl-C: the parent kills it instead. The request is one line of JSON on stdin; stdin then stays open,
and its end means that the parent is gone. Log lines go to stderr, the outcome into ``outcome.json``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cushion_deploy.engines.probe import child_environment, how_it_ended, package_root
from cushion_deploy.errors import CheckFailed

OUTCOME, PLAN, LAYERS = "outcome.json", "plan.partial", "layers.txt"
"""File names inside the scratch folder of the request."""
_CONVERSIONS = frozenset({"SHUFFLE", "CAST", "IDENTITY", "DEQUANTIZE"})
_DEPTH = 4
_TAIL = 15
"""Log lines of a failed build that the error shows."""


def run_worker(request: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Build in a child process and return its outcome; the child dies with this call, whatever ends it.

    Raises:
        CheckFailed: the parser refused the graph, the builder failed, or the library crashed.
        OSError: the plan could not be written.
    """
    log = scratch / "log.txt"
    command = [sys.executable, "-m", "cushion_deploy.engines.tensorrt_rtx_worker"]
    with open(log, "wb") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
            cwd=package_root(),
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches this process alone, which kills the child
        )
        try:
            _send(child, request)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                # What the dead child did not read is flushed once more here; its exit code tells why it did not.
                with suppress(BrokenPipeError):
                    child.stdin.close()
    outcome_file = scratch / OUTCOME
    if code != 0 or not outcome_file.exists():
        raise CheckFailed(
            f"TensorRT-RTX ended the build ({how_it_ended(code)}); its last log lines:\n{_tail(log)}",
            hint="if it was killed (SIGKILL), free memory: a build takes about four times the weights; "
            "otherwise report the lines above to https://github.com/NVIDIA/TensorRT-RTX",
        )
    outcome: dict[str, Any] = json.loads(outcome_file.read_text(encoding="utf-8"))
    if "os_error" in outcome:
        raise OSError(outcome["os_error"][0], outcome["os_error"][1], str(scratch.parent))
    if "errors" in outcome:
        lines = [f"{e['node'] or 'graph'} ({e['operator'] or 'no operator'}): {e['text']}" for e in outcome["errors"]]
        raise CheckFailed(
            f"TensorRT-RTX cannot read the graph, {len(lines)} errors:\n" + "\n".join(lines),
            hint="export the model again with this version of cushion-deploy",
        )
    if not outcome["built"]:
        raise CheckFailed(
            f"TensorRT-RTX built nothing; its last log lines:\n{_tail(log)}",
            hint="lower max_context, max_prefill or max_batch, or report the lines above",
        )
    return outcome


def read_listing(scratch: Path) -> str:
    """Return the one layer listing of a build; raises CheckFailed when there is none or several."""
    file = scratch / LAYERS
    listings = file.read_text(encoding="utf-8").split("\n\f\n")[:-1] if file.exists() else []
    if len(listings) != 1:
        raise CheckFailed(
            f"the builder wrote {len(listings)} layer listings, expected one",
            hint="the INT8 coverage of this plan cannot be counted; use the supported version of TensorRT-RTX",
        )
    return listings[0]


def main() -> int:
    """Serve one request; the exit code is 0 whenever an outcome was written."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    scratch = Path(request["scratch"])
    outcome = build(request, scratch)
    (scratch / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def build(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Build the plan of a request.

    Args:
        request: ``onnx`` (path), ``targets`` (names of compute capabilities), ``profiles`` (list of input name
            to [min, opt, max] shapes) and ``user_allocation`` (whether a CUDA graph shall be captured of the plan).
        scratch: folder for the plan and the layer listing.

    Returns:
        ``errors`` of the parser (then nothing was built), or ``os_error``, or what was built: ``linears``
        (node, weight), ``attention`` (see :func:`matmuls`), seconds, bytes.
    """
    trt: Any = importlib.import_module("tensorrt_rtx")
    started = time.monotonic()
    logger = _logger(trt, scratch / LAYERS)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return {"errors": [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]}
    parsed = time.monotonic()
    _allow_decomposition(trt, network)
    writer = _writer(trt, scratch / PLAN)
    config = _config(trt, builder, network, request)
    built = builder.build_serialized_network_to_stream(network, config, writer)
    size = writer.close()
    if writer.error is not None:
        return {"os_error": [writer.error.errno, writer.error.strerror]}
    return {
        "built": bool(built),
        "version": str(trt.__version__),
        "plan_bytes": size,
        "parse_seconds": round(parsed - started, 3),
        "build_seconds": round(time.monotonic() - parsed, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **matmuls(network),
    }


def matmuls(network: Any) -> dict[str, Any]:
    """Return the matrix products of a parsed network, sorted into linears and attention.

    A linear has a constant operand, perhaps behind a DQ; the name of that constant leads to its Site. Attention that
    is one operator counts as one product.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    producers = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
    linears, attention = [], []
    for layer in layers:
        if layer.type.name == "ATTENTION_OUTPUT":
            attention.append(layer.name.removesuffix("_AttentionOutput"))
        if layer.type.name != "MATRIX_MULTIPLY":
            continue
        weights = [name for i in range(2) if (name := _constant_behind(producers, layer.get_input(i))) is not None]
        if weights:
            linears.append({"node": layer.name, "weight": weights[-1]})
        else:
            attention.append(layer.name)
    return {"linears": linears, "attention": attention}


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention fall apart into products where no kernel takes its size or type; the build would fail there."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _constant_behind(producers: dict[str, Any], tensor: Any) -> str | None:
    """Return the constant that an operand is made of by layers which only convert it; None when it is computed."""
    for _ in range(_DEPTH):
        layer = producers.get(tensor.name)
        if layer is None:
            return None
        if layer.type.name == "CONSTANT":
            return str(layer.name)
        if layer.type.name not in _CONVERSIONS:
            return None
        tensor = layer.get_input(0)
    return None


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    # Only at this verbosity does the builder list its kernels with their types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # standard TensorRT has none
    if request["user_allocation"] and flag is not None:
        config.set_flag(flag)
    config.num_compute_capabilities = len(request["targets"])
    for i, target in enumerate(request["targets"]):
        config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], i)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            name = network.get_input(i).name
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
    return config


def _logger(trt: Any, layers: Path) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the listing of kernels, and passes on everything of INFO and above."""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                with open(layers, "a", encoding="utf-8") as f:
                    f.write(message.rstrip("\n") + "\n\f\n")
            elif severity.value <= trt.ILogger.Severity.INFO.value:
                print(f"{severity.name}: {message}", file=sys.stderr, flush=True)

    return Logger()


def _writer(trt: Any, path: Path) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes the plan as it comes, so that it never lies in memory a second time."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None
            self._file = open(path, "xb")  # noqa: SIM115 - closed by close()

        def write(self, data: bytes) -> int:
            try:
                return self._file.write(data)
            except OSError as e:  # raising through native code would end the process without a word
                self.error = e
                return 0

        def close(self) -> int:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError as e:
                self.error = self.error or e
            return path.stat().st_size

    return Writer()


def _parser_error(error: Any) -> dict[str, str]:
    return {"node": error.node_name(), "operator": error.node_operator(), "text": error.desc()}


def _leave_with_parent() -> None:
    """End this process, native build included, when the other end of stdin is gone."""
    sys.stdin.read()
    os._exit(1)


def _send(child: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    """Write the request and leave stdin open: its end tells the child that this process is gone."""
    if child.stdin is None:
        return
    # A child that died before it read is told by its exit code and log.
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL:])


if __name__ == "__main__":
    sys.exit(main())
