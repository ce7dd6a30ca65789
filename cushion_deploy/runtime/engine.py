"""Open an engine of a bundle: pick it from the registry and pass it verified bytes."""

from __future__ import annotations

import hashlib

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, read_artifact
from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.engines.registry import find_engine
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.runtime.bundle import Bundle, read_graph
from cushion_deploy.store import relinked

ATTEMPTS = 3
"""How often a bundle is opened whose files are linked elsewhere meanwhile."""
DEFAULT_ENGINE = "onnxruntime"
"""The engine on which every bundle runs: ONNX Runtime on the CPU."""


def open_engine(bundle: Bundle, engine: str = DEFAULT_ENGINE, threads: int | None = None) -> DecoderSession:
    """Open a session of a bundle on one of its engines.

    Args:
        bundle: a verified bundle.
        engine: a name in :data:`~cushion_deploy.engines.registry.ENGINES`.
        threads: threads of an engine on the CPU; None for one per physical core.

    The library opens ``model.onnx`` and its data by path, after they were verified. So the files are compared with
    their state at verification once the session is open, and it is closed if one was written or replaced meanwhile. A
    build that linked them into another folder meanwhile changed nothing but their times: they are verified and opened
    again.

    Raises:
        UsageError: an unknown engine, or one that the bundle was not built for.
        MissingDependency: the library of the engine, or its GPU, is missing.
        CheckFailed: the plan was compiled for another library version, GPU or graph.
        UntrustedArtifact: the plan is not the one in the manifest (no library has read a byte of it then), or a file
            changed while it was loaded.
    """
    attempts = ATTEMPTS
    while True:
        attempts -= 1
        session = _open(bundle, engine, threads)
        try:
            bundle.require_unchanged()
        except BaseException as e:
            session.close()
            if not isinstance(e, UntrustedArtifact) or not attempts or not _only_linked(bundle):
                raise
        else:
            return session
        bundle = bundle.verified_again()


def _only_linked(bundle: Bundle) -> bool:
    """Return whether nothing differs from the state at verification but change times of files that an engine reads."""
    graph = {file.relative_to(bundle.path).as_posix() for file in bundle.graph.files}
    # No build links what the bundle itself has read, such as the tokenizer, and verifying that again would not help.
    found = relinked(bundle.path, bundle.states)
    return bool(found) and all(name in graph or name.startswith("engines/") for name in found)


def _open(bundle: Bundle, engine: str, threads: int | None) -> DecoderSession:
    chosen = find_engine(engine)
    # Only a plan is needed to run: without a blob or a graph of the engine's own, model.onnx is opened.
    if chosen.compiles_to != "plan" and not (chosen.compiles_to in ("blob", "graph") and is_built_for(bundle, engine)):
        return chosen.open(bundle.graph, threads=threads)
    artifact = read_engine(bundle, engine)
    chosen.require_runnable(artifact, bundle.graph)
    plan = _read_plan(bundle, artifact) if chosen.reads(artifact) else b""
    return chosen.open(graph_of_engine(bundle, artifact), plan, threads=threads)


def graph_of_engine(bundle: Bundle, artifact: EngineArtifact) -> ExportedGraph:
    """Return the graph that an engine runs: its own, if it was compiled to one, or the bundle's.

    Every file of both is in the manifest, and was compared with it when the bundle was opened.
    """
    own = f"engines/{artifact.engine}"
    return read_graph(bundle.path / own) if f"{own}/{GRAPH_FILE}" in bundle.manifest.files else bundle.graph


def is_built_for(bundle: Bundle, engine: str) -> bool:
    """Return whether a bundle contains what was compiled for an engine."""
    return f"engines/{engine}/{ENGINE_FILE}" in bundle.manifest.files


def read_engine(bundle: Bundle, engine: str) -> EngineArtifact:
    """Return ``engine.json`` of one of a bundle's engines; raises UsageError if the bundle was not built for it."""
    if not is_built_for(bundle, engine):
        raise UsageError(
            f"{bundle.path} was not built for engine '{engine}'",
            hint=f"add it with `cushion-deploy engine {bundle.path} --engine {engine} --output {bundle.path}`",
        )
    folder = bundle.path / "engines" / engine
    artifact = read_artifact(folder)
    if artifact.engine != engine:
        raise UntrustedArtifact(f"{folder / ENGINE_FILE} describes '{artifact.engine}'", hint="build the bundle again")
    return artifact


def _read_plan(bundle: Bundle, artifact: EngineArtifact) -> bytes:
    """Return the bytes of a plan or blob after comparing their digest with the manifest.

    The bundle was verified when it was opened. Comparing again what was read here means that the bytes deserialized
    are the verified ones, even if the file changed in between.
    """
    paths = [f"engines/{artifact.engine}/{name}" for name in artifact.files if name != ENGINE_FILE]
    # A path in the manifest lies inside the bundle; any other is not read.
    entry = bundle.manifest.files.get(paths[0]) if len(paths) == 1 else None
    plan = (bundle.path / paths[0]).read_bytes() if entry else b""
    if entry is None or hashlib.sha256(plan).hexdigest() != entry.sha256:
        name = paths[0] if paths else f"engines/{artifact.engine}"
        raise UntrustedArtifact(f"{name} is not the plan in the manifest", hint="run `cushion-deploy verify`")
    return plan
