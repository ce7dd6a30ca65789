"""Both ends of the child process that drives TensorRT: parse an ONNX file, build one plan, report the outcome.

A child process, because a fault in a native library ends the process, and because native code does not react to Ctrl-C
during a build: the parent kills the child instead. The request is one line of JSON on stdin. Stdin then stays open, and
its end means that the parent is gone. Log lines go to stderr, the outcome to ``outcome.json``.
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
from cushion_deploy.engines.tensorrt.flavours import Flavour
from cushion_deploy.engines.tensorrt.network import ParsedNetwork
from cushion_deploy.errors import CheckFailed

OUTCOME, PLAN, LAYERS, INSPECTION = "outcome.json", "plan.partial", "layers.txt", "layers.json"
"""File names in the scratch folder."""
_TAIL = 15
"""Last log lines of a failed build that the error shows."""


def run_worker(flavour: Flavour, request: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Build in a child process and return its outcome; the child never outlives this call.

    Args:
        flavour: library that builds.
        request: see :func:`build`; the module is added.
        scratch: empty folder.

    Raises:
        CheckFailed: the parser rejects the graph, the builder fails, or the library crashes.
        OSError: the plan could not be written.
    """
    log = scratch / "log.txt"
    command = [sys.executable, "-m", "cushion_deploy.engines.tensorrt.worker"]
    with open(log, "wb") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
            cwd=package_root(),
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches only this process, which kills the child
        )
        try:
            _send(child, {**request, "module": flavour.module, "scratch": str(scratch.resolve())})
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                # close() flushes what the child did not read; its exit code says why it did not.
                with suppress(BrokenPipeError):
                    child.stdin.close()
    outcome_file = scratch / OUTCOME
    if code != 0 or not outcome_file.exists():
        raise CheckFailed(
            f"{flavour.product} ended the build ({how_it_ended(code)}); its last log lines:\n{_tail(log)}",
            hint="if it was killed (SIGKILL), free memory: a build takes about four times the weights; "
            f"otherwise report the lines above to {flavour.issues}",
        )
    outcome: dict[str, Any] = json.loads(outcome_file.read_text(encoding="utf-8"))
    if "os_error" in outcome:
        raise OSError(outcome["os_error"][0], outcome["os_error"][1], str(scratch.parent))
    if "errors" in outcome:
        lines = [f"{e['node'] or 'graph'} ({e['operator'] or 'no operator'}): {e['text']}" for e in outcome["errors"]]
        raise CheckFailed(
            f"{flavour.product} cannot read the graph, {len(lines)} errors:\n" + "\n".join(lines),
            hint="export the model again with this version of cushion-deploy",
        )
    if not outcome["built"]:
        raise CheckFailed(
            f"{flavour.product} built nothing; its last log lines:\n{_tail(log)}",
            hint="lower max_context, max_prefill or max_batch, or report the lines above",
        )
    return outcome


def read_inspection_file(scratch: Path) -> str:
    """Return the JSON of the engine inspector; raises CheckFailed if the plan could not be opened."""
    file = scratch / INSPECTION
    if not file.exists():
        raise CheckFailed(
            "the plan was built and cannot be opened here, so its INT8 coverage cannot be counted",
            hint="check `nvidia-smi`; free device memory",
        )
    return file.read_text(encoding="utf-8")


def read_listing(scratch: Path) -> str:
    """Return the layer listing of a build; raises CheckFailed unless there is exactly one."""
    file = scratch / LAYERS
    listings = file.read_text(encoding="utf-8").split("\n\f\n")[:-1] if file.exists() else []
    if len(listings) != 1:
        raise CheckFailed(
            f"the builder wrote {len(listings)} layer listings, expected one",
            hint="the INT8 coverage of this plan cannot be counted; use the supported version of the library",
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
        request: ``module`` of the library, ``onnx`` (path), ``targets`` (names of compute capabilities; none for the
            device here), ``profiles`` (list of input name to [min, opt, max] shapes) and ``user_allocation`` (True
            if the plan will be captured as a CUDA graph).
        scratch: folder for the plan and the listing of its layers.

    Returns:
        ``errors`` of the parser (then nothing was built), or ``os_error``, or the outcome of the build: seconds, bytes,
        and the result of :meth:`~cushion_deploy.engines.tensorrt.network.ParsedNetwork.matmuls`.
    """
    trt: Any = importlib.import_module(request["module"])
    started = time.monotonic()
    logger = _logger(trt, scratch / LAYERS)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return {"errors": [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]}
    parsed = time.monotonic()
    found = ParsedNetwork(trt, network)
    found.allow_decomposition()
    writer = _writer(trt, scratch / PLAN)
    built = _write_plan(builder, network, _config(trt, builder, network, request), writer)
    size = writer.close()
    if writer.error is not None:
        return {"os_error": [writer.error.errno, writer.error.strerror]}
    finished = time.monotonic()
    if built and not request["targets"]:
        _inspect(trt, logger, scratch)
    return {
        "built": built,
        "version": str(trt.__version__),
        "plan_bytes": size,
        "parse_seconds": round(parsed - started, 3),
        "build_seconds": round(finished - parsed, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **found.matmuls(),
    }


def _write_plan(builder: Any, network: Any, config: Any, writer: Any) -> bool:
    """Build and write the plan, as a stream if the library supports that; older versions hold it in memory."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, writer))
    plan = builder.build_serialized_network(network, config)
    if plan is not None:
        writer.write(plan)
    return plan is not None


def _inspect(trt: Any, logger: Any, scratch: Path) -> None:
    """Write the JSON of the engine inspector for the plan that was just built."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((scratch / PLAN).read_bytes())
    if engine is not None:
        found = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        (scratch / INSPECTION).write_text(found, encoding="utf-8")


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    # Only at this verbosity does the builder list its kernels with their types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # not in standard TensorRT
    if request["user_allocation"] and flag is not None:
        config.set_flag(flag)
    if request["targets"]:
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
        """Saves the listing of kernels, and passes on messages of INFO and above."""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                with open(layers, "a", encoding="utf-8") as f:
                    f.write(message.rstrip("\n") + "\n\f\n")
            elif severity.value <= trt.ILogger.Severity.INFO.value:
                print(f"{severity.name}: {message}", file=sys.stderr, flush=True)

    return Logger()


def _writer(trt: Any, path: Path) -> Any:
    base: Any = getattr(trt, "IStreamWriter", object)

    class Writer(base):  # type: ignore[misc]
        """Writes the plan as it is produced, so that it is never in memory twice."""

        def __init__(self) -> None:
            base.__init__(self)
            self.error: OSError | None = None
            self._file = open(path, "xb")  # noqa: SIM115 - closed by close()

        def write(self, data: bytes) -> int:
            try:
                return self._file.write(data)
            except OSError as e:  # an exception in native code would end the process without a message
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
    """End this process, including a native build, when the parent closes stdin."""
    sys.stdin.read()
    os._exit(1)


def _send(child: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    """Write the request and leave stdin open: its end signals the child that this process is gone."""
    if child.stdin is None:
        return
    # If the child died before reading, its exit code and log say why.
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL:])


if __name__ == "__main__":
    sys.exit(main())
