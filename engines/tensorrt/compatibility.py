"""Check whether a compiled plan can run on this machine; an error names each mismatch and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.probe import Probe
from cushion_deploy.engines.tensorrt.flavours import FLAVOURS
from cushion_deploy.errors import CheckFailed, MissingDependency


@dataclass(frozen=True)
class Mismatch:
    """One reason why a plan cannot run on this machine, and how to fix it."""

    problem: str
    fix: str

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.problem}: {self.fix}"


def mismatches(artifact: EngineArtifact, graph: ExportedGraph, version: str, gpus: Sequence[str]) -> list[Mismatch]:
    """Return why a plan does not match a bundle, a library and a GPU; empty if it does.

    Args:
        artifact: ``engine.json`` of the plan.
        graph: graph of the bundle that holds the plan.
        version: version of the installed library.
        gpus: GPUs as in :class:`~cushion_deploy.engines.probe.Probe`; the first is used.
    """
    found = []
    here = gpus[0].partition(" ")[0]
    rebuild = f"`cushion-deploy engine BUNDLE --engine {artifact.engine} --targets {here} --output NEW`"
    if refused := FLAVOURS[artifact.engine].refused.get(here):
        # No plan of this library runs here, whatever it was compiled from.
        fix = f"{here} is {refused}; or run the bundle with --engine onnxruntime"
        return [Mismatch(f"the plan is for {', '.join(artifact.targets)} and this device is {gpus[0]}", fix)]
    expected = vars(replace(graph.lineage, graph=artifact.lineage.graph))
    for part in artifact.lineage.differences(expected):
        found.append(Mismatch(f"the plan was compiled from {part} than this bundle's", f"run {rebuild}"))
    mode = artifact.details.get("prefix_mode", graph.contract.prefix_mode)
    if mode != graph.contract.prefix_mode:
        found.append(
            Mismatch(
                f"the plan was compiled with export.prefix={mode}, this bundle has {graph.contract.prefix_mode}",
                f"run {rebuild}",
            )
        )
    compiled_by = artifact.versions.get(artifact.engine, "")
    if compiled_by != version:
        found.append(
            Mismatch(
                f"the plan was compiled by {artifact.engine} {compiled_by} and {version} is installed",
                f"install {compiled_by}, or run {rebuild}",
            )
        )
    device = artifact.details.get("device") or ""
    if here not in artifact.targets or device not in ("", gpus[0]):
        compiled_for = device or ", ".join(artifact.targets)
        found.append(Mismatch(f"the plan is for {compiled_for} and this device is {gpus[0]}", f"run {rebuild}"))
    return found


def require_runnable(artifact: EngineArtifact, graph: ExportedGraph, found: Probe, install: str) -> None:
    """Check that a plan can run on this machine, before its bytes are read.

    Args:
        artifact: ``engine.json`` of the plan.
        graph: graph of the bundle that holds the plan.
        found: the library and the GPUs of this machine.
        install: command that installs what running a plan needs.

    Raises:
        MissingDependency: the library or the GPU is missing.
        CheckFailed: the plan does not match the bundle, the library or the GPU; the message names every mismatch.
    """
    if not found.importable:
        raise MissingDependency(f"{artifact.engine} cannot be used: {found.problem}", hint=install)
    if not found.gpus:
        raise MissingDependency(
            f"{artifact.engine} runs on an NVIDIA GPU, and there is none here",
            hint="run the bundle with --engine onnxruntime",
        )
    wrong = mismatches(artifact, graph, found.version, found.gpus)
    if wrong:
        raise CheckFailed("; ".join(m.problem for m in wrong), hint="; ".join(m.fix for m in wrong))
