"""Open any engine of a bundle by one interface."""

from __future__ import annotations

import hashlib
import json

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.session import DecoderSession, cached_prefix, cached_scales
from cushion_deploy.engines.onnxruntime.session import PROVIDERS, open_session
from cushion_deploy.engines.probe import probe
from cushion_deploy.engines.tensorrt.compatibility import require_runnable
from cushion_deploy.engines.tensorrt.flavours import FLAVOURS
from cushion_deploy.engines.tensorrt.session import TensorRtSession
from cushion_deploy.errors import UntrustedArtifact, UsageError, unknown_choice
from cushion_deploy.runtime.bundle import Bundle

ENGINES = (*PROVIDERS, *FLAVOURS)
REPORT = "engine.json"


def open_engine(bundle: Bundle, engine: str = "onnxruntime", threads: int | None = None) -> DecoderSession:
    """Return a session of one of a bundle's engines.

    Args:
        bundle: verified.
        engine: one of ``ENGINES``.
        threads: of an engine on the CPU; None for one per physical core.

    Raises:
        UsageError: an unknown engine, or one that the bundle was not built for.
        MissingDependency: the engine's library, or its device, is not there.
        CheckFailed: the plan is for another library or device.
        UntrustedArtifact: a plan that is not the one in the manifest; no library has then seen it.
    """
    if engine not in ENGINES:
        raise unknown_choice("engine", engine, list(ENGINES))
    if engine in PROVIDERS:
        return open_session(bundle.graph, threads=threads, provider=PROVIDERS[engine])
    artifact = read_engine(bundle, engine)
    flavour = FLAVOURS[engine]
    install = f"pip install 'cushion-deploy[{flavour.extra},cuda]'"
    require_runnable(artifact, bundle.graph, probe(flavour.module), install)
    return open_plan(engine, _read_plan(bundle, artifact), bundle.graph)


def open_plan(engine: str, plan: bytes, graph: ExportedGraph) -> TensorRtSession:
    """Return a session of a plan that is known to be what was compiled from a graph."""
    module = FLAVOURS[engine].module
    return TensorRtSession(plan, graph.contract, module, cached_prefix(graph), cached_scales(graph))


def read_engine(bundle: Bundle, engine: str) -> EngineArtifact:
    """Return what a bundle says of one of its engines; raises UsageError where it was not built for it."""
    file = bundle.path / "engines" / engine / REPORT
    if f"engines/{engine}/{REPORT}" not in bundle.manifest.files:
        raise UsageError(f"{bundle.path} was not built for engine '{engine}'", hint=f"build it with --engine {engine}")
    try:
        artifact = EngineArtifact.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError) as e:
        raise UntrustedArtifact(f"{file} does not describe an engine: {e}", hint="build the bundle again") from e
    if artifact.engine != engine:
        raise UntrustedArtifact(f"{file} describes '{artifact.engine}'", hint="build the bundle again")
    return artifact


def _read_plan(bundle: Bundle, artifact: EngineArtifact) -> bytes:
    """Return a plan's bytes, compared with the manifest once more: what is deserialized is what was read here."""
    paths = [f"engines/{artifact.engine}/{name}" for name in artifact.files if name != REPORT]
    # What the manifest lists is inside of the bundle; what it does not list is not read.
    entry = bundle.manifest.files.get(paths[0]) if len(paths) == 1 else None
    plan = (bundle.path / paths[0]).read_bytes() if entry else b""
    if entry is None or hashlib.sha256(plan).hexdigest() != entry.sha256:
        name = paths[0] if paths else f"engines/{artifact.engine}"
        raise UntrustedArtifact(f"{name} is not the plan in the manifest", hint="run `cushion-deploy verify`")
    return plan
