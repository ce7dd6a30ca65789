"""Execution providers and session settings of ONNX Runtime, shared by the coverage count and by sessions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cushion_deploy.engines.onnxruntime.kernels import SESSION_CONFIG, exact_kernels
from cushion_deploy.errors import MissingDependency, UsageError

GPU_DISTRIBUTION = "onnxruntime-gpu"
DISTRIBUTIONS = ("onnxruntime", GPU_DISTRIBUTION)
HEAD_KERNEL = (1, 25)
"""First version that fuses the MatMul of a head with the DQ of INT8 codes with scales by block; older ones dequantize
the whole table in every step."""
CHUNK = 128
"""Most prompt tokens in one call by default."""
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Config entry with which a session can be asked for the provider of every node."""
DEQUANTIZE_WEIGHTS = "session.disable_quant_qdq"
"""Config entry with which ONNX Runtime treats Q and DQ as ordinary operators, so that it folds a DQ of a constant."""
_CPU = "CPUExecutionProvider"
_INSTALL_GPU = "pip uninstall onnxruntime, then pip install 'cushion-deploy[gpu]'"


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime, and the engine that runs ``model.onnx`` on it.

    Attributes:
        engine: name of the engine.
        name: name of the provider in ONNX Runtime.
        install: command or advice that installs it.
        device: ONNX Runtime's name of the device that holds the cache between steps; empty for the host.
        multiplies_floats: whether its linears multiply the values that codes stand for. Weights are then dequantized
            once, when a graph is loaded, instead of at every step.
        gathers_codes: whether it runs a graph with the codes of an INT8 embedding.
        options: options of the provider.
    """

    engine: str
    name: str
    install: str
    device: str = ""
    multiplies_floats: bool = False
    gathers_codes: bool = True
    options: tuple[tuple[str, str], ...] = ()

    @property
    def chain(self) -> list[str]:
        """Providers of a session: this one, and the CPU for what it does not support."""
        return list(dict.fromkeys([self.name, _CPU]))

    @property
    def configured(self) -> list[str | tuple[str, dict[str, str]]]:
        """The same providers, this one with its options."""
        return [(name, dict(self.options)) if self.options and name == self.name else name for name in self.chain]

    @property
    def config(self) -> dict[str, str]:
        """Config entries of its sessions, beside :func:`session_config`."""
        found = {} if self.name == _CPU else {RECORD_PLACEMENT: "1"}
        return {**found, **({DEQUANTIZE_WEIGHTS: "1"} if self.multiplies_floats else {})}


CPU = Provider("onnxruntime", _CPU, "pip install 'cushion-deploy[cpu]'")
CUDA = Provider("onnxruntime-cuda", "CUDAExecutionProvider", _INSTALL_GPU, "cuda", multiplies_floats=True)
TENSORRT = Provider(
    "onnxruntime-tensorrt",
    "TensorrtExecutionProvider",
    _INSTALL_GPU,
    "cuda",
    gathers_codes=False,
    # Without it, TensorRT before 11 builds no engine of a graph with Q and DQ (microsoft/onnxruntime, issue 13381).
    options=(("trt_int8_enable", "1"),),
)
TENSORRT_RTX = Provider(
    "onnxruntime-tensorrt-rtx",
    "NvTensorRTRTXExecutionProvider",
    "install a build with this provider, such as onnxruntime-trt-rtx",
    "cuda",
    gathers_codes=False,
)


@dataclass(frozen=True)
class SessionSettings:
    """How a session runs a graph.

    Attributes:
        threads: threads of one operator; None for one per physical core.
        fused: False runs the graph as written, Q and DQ as separate nodes: the slow reference.
        chunk: most prompt tokens in one call. A prompt fed in chunks skips most of what the causal mask would discard.
        provider: execution provider; nodes that a GPU provider does not support run on the CPU.
        prepack: False keeps no second copy of the weights in the layout of the kernels: half the memory, and slower.

    Raises:
        UsageError: a value below 1.
    """

    threads: int | None = None
    fused: bool = True
    chunk: int = CHUNK
    provider: Provider = CPU
    prepack: bool = True

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"chunk is {self.chunk}", hint="feed at least 1 token in a call, 128 by default")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}", hint="give at least 1, or leave it out for one per core")


DEFAULTS = SessionSettings()


def session_config() -> dict[str, str]:
    """Return the config entries of every session in this process: :data:`SESSION_CONFIG`, and exact integer kernels.

    Coverage is counted with the same entries, so what was counted is what runs.

    Raises:
        MissingDependency: onnxruntime is not installed.
        CheckFailed: no integer kernel is exact on this processor.
    """
    import_onnxruntime()
    return {**exact_kernels(), **SESSION_CONFIG}


def session_options(settings: SessionSettings = DEFAULTS) -> Any:
    """Return the ``onnxruntime.SessionOptions`` of a decoder graph.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    # Errors only: it warns of every initializer that a caller may override, as logits_start is on purpose.
    options.log_severity_level = 3
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    # ONNX Runtime applies flush-to-zero to the calling thread only through the first session of a process; to its own
    # worker threads through every session. So every session carries the entry.
    for key, value in {**session_config(), **settings.provider.config}.items():
        options.add_session_config_entry(key, value)
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not settings.fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(DEQUANTIZE_WEIGHTS, "1")
    return options


def import_onnxruntime() -> Any:
    """Return the module; raises MissingDependency, with the install command, if it is not installed."""
    try:
        import onnxruntime
    except ImportError as e:
        raise MissingDependency("onnxruntime is not installed", hint=CPU.install) from e
    return onnxruntime


def has_head_kernel() -> bool:
    """Return whether the installed version has :data:`HEAD_KERNEL`; True if none is installed."""
    try:
        major, minor = installed_version(CPU).split(".")[:2]
    except MissingDependency:
        return True
    return (int(major), int(minor)) >= HEAD_KERNEL


def installed_version(provider: Provider) -> str:
    """Return the version of ONNX Runtime, without importing it.

    Raises:
        MissingDependency: no distribution of it is installed; the hint is the install command of the provider.
    """
    for name in filter(is_installed, DISTRIBUTIONS):
        return metadata.version(name)
    raise MissingDependency(
        f"engine '{provider.engine}' needs {DISTRIBUTIONS[0]}, which is not installed", hint=provider.install
    )


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is installed, without importing it."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
