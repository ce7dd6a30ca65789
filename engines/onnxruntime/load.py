"""Load a graph on exactly the execution provider that was asked for, and count the nodes that it left to the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.engines.external_data import require_data_beside
from cushion_deploy.engines.onnxruntime.settings import SessionSettings, import_onnxruntime, session_options
from cushion_deploy.errors import CheckFailed, MissingDependency, UntrustedArtifact


@dataclass(frozen=True)
class Placement:
    """On which provider the nodes of an optimized graph run.

    Attributes:
        provider: the provider that was asked for.
        nodes: number of nodes of each provider.
        elsewhere: operators of the nodes that run on another provider, counted.
    """

    provider: str
    nodes: Counter[str]
    elsewhere: Counter[str]

    @property
    def words(self) -> str:
        """How many nodes run elsewhere and what they compute, in one sentence without a period."""
        total = self.nodes.total()
        if not self.elsewhere:
            return f"all {total:,} nodes on {self.provider}"
        operators = ", ".join(f"{count:,} {name}" for name, count in self.elsewhere.most_common())
        return f"{self.elsewhere.total():,} of {total:,} nodes not on {self.provider}: {operators}"


def load_graph(model_path: Path, settings: SessionSettings) -> tuple[Any, Placement | None]:
    """Return the ``InferenceSession`` of a graph, and where its nodes run; None on the CPU provider, which runs all.

    Raises:
        MissingDependency: onnxruntime or its provider is missing, or this version cannot tell where nodes run.
        UntrustedArtifact: the file is not a graph that ONNX Runtime can load, or it reads tensors from elsewhere.
        CheckFailed: a matrix product is left to another provider.
    """
    ort, provider = import_onnxruntime(), settings.provider
    available = ort.get_available_providers()
    if provider.name not in available:
        raise MissingDependency(
            f"this ONNX Runtime has no {provider.name}; it has {', '.join(available)}", hint=provider.install
        )
    require_data_beside(model_path)
    try:
        session = ort.InferenceSession(model_path, session_options(settings), providers=provider.configured)
        _read_names(session)
    except Exception as e:  # its errors share no base class but Exception
        raise UntrustedArtifact(
            f"ONNX Runtime cannot load {model_path}: {(str(e) or type(e).__name__).splitlines()[0]:.300}",
            hint="run `cushion-deploy verify` on the bundle; if it is intact, build it again",
        ) from e
    # If a driver or a library of the provider is missing, it falls back to the CPU without an error.
    if session.get_providers() != provider.chain:
        raise MissingDependency(
            f"ONNX Runtime runs the graph on {', '.join(session.get_providers())}, asked for {provider.name}",
            hint="check `nvidia-smi`, and which CUDA this onnxruntime needs; or run --engine onnxruntime",
        )
    return session, None if len(provider.chain) == 1 else _placement(session, settings)


def _read_names(session: Any) -> None:
    """Read every name and dimension of a graph's interface: bytes that are not UTF-8 raise UnicodeDecodeError."""
    for value in (*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers()):
        value.name, value.shape  # noqa: B018 - they are decoded when they are read


def _placement(session: Any, settings: SessionSettings) -> Placement:
    """Return where the nodes run; single nodes fall back to the CPU without a message."""
    provider = settings.provider
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise MissingDependency(
            f"this ONNX Runtime cannot tell which nodes {provider.name} leaves to the CPU",
            hint=f"update it: {provider.install}",
        )
    nodes, elsewhere = Counter[str](), Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        operators = [node.op_type for node in part.get_nodes()]
        nodes[part.ep_name] += len(operators)
        if part.ep_name != provider.name:
            elsewhere.update(operators)
    found = Placement(provider.name, nodes, elsewhere)
    if any("MatMul" in name or "Gemm" in name for name in elsewhere):
        raise CheckFailed(
            f"{provider.engine} leaves matrix products to the CPU: {found.words}",
            hint="run the bundle with --engine onnxruntime, or with another version of this runtime",
        )
    return found
