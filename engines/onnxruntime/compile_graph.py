"""Compile for a provider that runs another graph than ``model.onnx``, and write that graph.

TensorRT runs a graph that stores no codes of an embedding. It is written as it was exported.

ONNX Runtime's CUDA provider runs a quantized linear 2 to 6 times slower than a float16 one (H200, version 1.31, linears
of 2048 and 4096). The graph written here has the codes, scales and quantizers of the bundle, so it computes what was
evaluated; the products are those of float16 kernels. Where the values of the model do not fit into float16, nothing is
written, and ``model.onnx`` runs in float32.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact, write_artifact
from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph
from cushion_deploy.engines.external_data import require_data_beside
from cushion_deploy.engines.onnxruntime.float_products import multiply_in_float16
from cushion_deploy.engines.onnxruntime.settings import Provider, installed_version
from cushion_deploy.errors import CheckFailed
from cushion_deploy.store import hash_file, place, require_space
from cushion_deploy.store.digests import digest_json


def compile_graph(graph: ExportedGraph, folder: Path, provider: Provider) -> EngineArtifact:
    """Write the graph that a provider runs, its description and ``engine.json`` into ``folder``.

    Where floats are multiplied, a float32 graph is ``model.onnx`` itself: only ``engine.json`` is written. It runs on
    any machine with the provider, whatever the version that wrote it.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        UsageError: too little disk space.
        CheckFailed: the graph stores an embedding as codes that the provider cannot read, or its linears are not those
            of its description.
        UntrustedArtifact: the graph reads tensors from elsewhere than beside it.
    """
    require_data_beside(graph.path)
    version, dtype, own = installed_version(provider), graph.contract.dtype, None
    if graph.int8_embedding and not provider.gathers_codes:
        raise CheckFailed(
            f"the graph stores the embedding as INT8 codes, which {provider.name} cannot read",
            hint=f"compile it for a bundle: `cushion-deploy engine BUNDLE --engine {provider.engine}`",
        )
    if provider.multiplies_floats and graph.quantized and dtype == "float16":
        own = _write(graph, folder)
    elif not provider.multiplies_floats:
        own = _copy(graph, folder)
    files = (ENGINE_FILE, *((GRAPH_FILE, *(file.name for file in own.files)) if own else ()))
    kind = {"float_products": dtype} if provider.multiplies_floats else {"uncounted": True}
    artifact = EngineArtifact(
        engine=provider.engine,
        targets=(provider.device,),
        key=digest_json({"graph": graph.digest, "engine": provider.engine, "form": next(iter(kind)).replace("_", " ")}),
        files=files,
        linears=graph.linears,
        int8_linears=0,
        fused_attention=0,
        ran=False,
        details={
            "dtype": dtype,
            **kind,
            "prefix_mode": graph.contract.prefix_mode,
            "not_run": "not run: compilation executes nothing",
        },
        lineage=replace(graph.lineage, graph=graph.digest),
        versions={provider.engine: version},
    )
    write_artifact(artifact, folder)
    return artifact


def require_same_bundle(artifact: EngineArtifact, graph: ExportedGraph) -> None:
    """Check that a compiled graph and the graph of a bundle were exported from the same parts.

    Raises:
        CheckFailed: another model, prefix, smoothing or scales, or another place of the prefix; both are named.
    """
    different = [*artifact.lineage.differences(vars(replace(graph.lineage, graph=artifact.lineage.graph)))]
    if artifact.details.get("prefix_mode") != graph.contract.prefix_mode:
        different.append("another place of the prefix")
    if different:
        raise CheckFailed(
            f"the graph of {artifact.engine} was compiled from {' and '.join(different)} than this bundle's",
            hint=f"run `cushion-deploy engine BUNDLE --engine {artifact.engine} --output NEW`",
        )


def _copy(graph: ExportedGraph, folder: Path) -> ExportedGraph:
    """Write a graph as it is, with its description."""
    require_space(folder, graph.size)
    for file in graph.files:
        # Copied, not linked: onnx rejects external data with a second hard link as a possible attack.
        place(file, folder / file.name, link=False)
    (folder / GRAPH_FILE).write_text(json.dumps(graph.to_json(), indent=1) + "\n", encoding="utf-8")
    return replace(graph, path=folder / graph.path.name)


def _write(graph: ExportedGraph, folder: Path) -> ExportedGraph:
    """Write the rewritten graph and what lies beside it; the weights are those of ``graph``."""
    import onnx_ir as ir

    require_space(folder, graph.size)
    for file in graph.files[1:]:
        place(file, folder / file.name, link=False)
    model = ir.load(graph.path)
    found = multiply_in_float16(model)
    if found != set(graph.sites):
        differing = sorted(found ^ set(graph.sites))
        raise CheckFailed(
            f"{len(found)} of {len(graph.sites)} quantized products were found in the graph; differing: {differing[0]}",
            hint="build the bundle again, and report this",
        )
    path = folder / graph.path.name
    # What is external stays so: the file refers to the weights that lie beside it.
    ir.save(model, path)
    own = replace(graph, path=path, rules=(), digest="")
    own = replace(own, digest=digest_json({file.name: hash_file(file) for file in own.files}))
    (folder / GRAPH_FILE).write_text(json.dumps(own.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return own
