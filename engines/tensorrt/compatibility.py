"""May a compiled plan run here? Every reason why not is one sentence, with the remedy beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.probe import Probe
from cushion_deploy.errors import CheckFailed, MissingDependency


@dataclass(frozen=True)
class Mismatch:
    """One reason why a plan cannot run here, and what to do about it."""

    sentence: str
    remedy: str

    def __str__(self) -> str:
        """Put both into one line."""
        return f"{self.sentence}: {self.remedy}"


def mismatches(artifact: EngineArtifact, graph: ExportedGraph, version: str, gpus: Sequence[str]) -> list[Mismatch]:
    """Return why a plan does not fit a bundle, a library and a device; empty where it does.

    Args:
        artifact: of the plan.
        graph: of the bundle that holds it.
        version: of the library here.
        gpus: devices here as :class:`~cushion_deploy.engines.probe.Probe` names them; the first is used.
    """
    found = []
    here = gpus[0].partition(" ")[0]
    rebuild = f"`cushion-deploy engine BUNDLE --engine {artifact.engine} --targets {here} --output NEW`"
    expected = vars(replace(graph.lineage, graph=artifact.lineage.graph))
    for part in artifact.lineage.differences(expected):
        found.append(Mismatch(f"the plan was made of {part} than this bundle's", f"run {rebuild}"))
    mode = artifact.details.get("prefix_mode", graph.contract.prefix_mode)
    if mode != graph.contract.prefix_mode:
        found.append(
            Mismatch(
                f"the plan was made with export.prefix={mode}, this bundle with {graph.contract.prefix_mode}",
                f"run {rebuild}",
            )
        )
    made_with = artifact.versions.get(artifact.engine, "")
    if made_with != version:
        found.append(
            Mismatch(
                f"the plan was made by {artifact.engine} {made_with} and {version} is installed",
                f"install {made_with}, or run {rebuild}",
            )
        )
    device = artifact.details.get("device") or ""
    if here not in artifact.targets or device not in ("", gpus[0]):
        made_for = device or ", ".join(artifact.targets)
        found.append(Mismatch(f"the plan is for {made_for} and this device is {gpus[0]}", f"run {rebuild}"))
    return found


def require_runnable(artifact: EngineArtifact, graph: ExportedGraph, found: Probe, install: str) -> None:
    """Check that a plan can run here, before its bytes are looked at.

    Raises:
        MissingDependency: the library or a device is not there.
        CheckFailed: the plan is for another library or device; the message names every mismatch.
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
        raise CheckFailed("; ".join(m.sentence for m in wrong), hint="; ".join(m.remedy for m in wrong))
