"""Why the answers of a left-padded batch can differ from those of each row alone: rounding, or a mistake.

    python bench/padding.py BUNDLE --threads 1

Texts of several lengths are computed alone and in one left-padded batch, by the INT8 graph of a bundle and by its twin
without rounding: the same graph, weights included, with the Q/DQ pairs of activations removed. A wrong mask or position
would show in both. What only the INT8 graph has is codes that flip: sums in another order move a value by a few
units of its last place, and where that crosses the middle between two codes, the difference becomes a whole step of the
scale. As a control, the rows alone are computed again with an embedding whose elements are moved by one such unit.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.host import cpu_description, installed_versions
from cushion_deploy.core.session import first_caches, past_names
from cushion_deploy.engines.onnxruntime.settings import SessionSettings, import_onnxruntime, session_options
from cushion_deploy.runtime import open_bundle
from cushion_deploy.runtime.batch import padded

EMBEDDING = "model.embed_tokens.weight"


class Graph:
    """A graph in ONNX Runtime, computed from an empty cache."""

    def __init__(
        self, model: onnx.ModelProto, contract: Any, threads: int, outputs: Sequence[str] = ("logits",)
    ) -> None:
        """Load it from memory."""
        ort = import_onnxruntime()
        settings = session_options(SessionSettings(threads))
        self._session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        self._contract, self._outputs = contract, list(outputs)

    def run(self, rows: list[list[int]]) -> list[list[FloatArray]]:
        """Return each output for each row, ``[length, width]``, the padding cut off."""
        ids, mask = padded(rows)
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        feed["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        feed |= dict(zip(past_names(self._contract), first_caches(self._contract, None, len(rows)), strict=True))
        found = self._session.run(self._outputs, feed)
        return [[x[i, -len(row) :] for x in found] for i, row in enumerate(rows)]


def with_float_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its INT8 weights multiplied by their scales, which no runtime then computes in integers."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    tensors = {t.name: t for t in other.graph.initializer}
    for node in [n for n in other.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors]:
        codes, scales = (onnx.numpy_helper.to_array(tensors[name]) for name in node.input[:2])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)] if scales.ndim else []
        weights = codes.astype(np.float32) * scales.reshape(shape)
        other.graph.initializer.append(onnx.numpy_helper.from_array(weights, node.output[0]))
        other.graph.node.remove(node)
    return other


def without_rounding(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str, float]]]:
    """Return the graph with the Q/DQ pairs of activations removed, and of each pair its input, codes and scale."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    scales = {t.name: t for t in model.graph.initializer if t.name.endswith(".scale")}
    quantized = {n.output[0]: n for n in twin.graph.node if n.op_type == "QuantizeLinear"}
    pairs = [n for n in twin.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in quantized]
    floats = {n.output[0]: quantized[n.input[0]].input[0] for n in pairs}
    kept = [n for n in twin.graph.node if n.output[0] not in floats and n.output[0] not in quantized]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = floats.get(name, name)
    del twin.graph.node[:]
    twin.graph.node.extend(kept)
    sites = [
        (n.input[0], n.output[0], float(onnx.numpy_helper.to_array(scales[n.input[1]]))) for n in quantized.values()
    ]
    return twin, sites


def moved(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return the graph with every element of the embedding moved by one unit of its last place, up or down."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    tensor = next(t for t in other.graph.initializer if t.name == EMBEDDING)
    table = onnx.numpy_helper.to_array(tensor)
    up = np.random.default_rng(seed).random(table.shape) < 0.5
    away = np.where(up, np.float32(np.inf), np.float32(-np.inf))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(table, away), EMBEDDING))
    return other


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the graph with further outputs."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    kinds = {name: onnx.TensorProto.INT8 if name.endswith(".codes") else onnx.TensorProto.FLOAT for name in names}
    other.graph.output.extend(onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in names)
    return other


def compared(ones: list[FloatArray], others: list[FloatArray]) -> list[dict[str, Any]]:
    """Return how far the logits of each row are apart."""
    found = []
    for one, other in zip(ones, others, strict=True):
        apart = np.abs(one - other).max(axis=1)
        found.append(
            {
                "tokens": len(one),
                "largest": float(apart.max()),
                "median": float(np.median(apart)),
                "90 %": float(np.quantile(apart, 0.9)),
                "same top-1": float((one.argmax(1) == other.argmax(1)).mean()),
            }
        )
    return found


def flips(graph: Graph, batches: Sequence[list[list[int]]], scales: Sequence[float]) -> dict[str, Any]:
    """Return how many codes differ between batches and their rows alone, and where the first ones of a row come from.

    Args:
        graph: its outputs are the values before each Site and its codes, in turn.
        batches: the rows of each batch.
        scales: scale of each Site.
    """
    differing, total, steps, before, margins = 0, 0, 0, 0.0, []
    for rows in batches:
        for row, together in zip(rows, graph.run(rows), strict=True):
            alone, flipped = graph.run([row])[0], False
            for i, scale in enumerate(scales):
                apart = np.abs(alone[2 * i + 1].astype(int) - together[2 * i + 1])
                differing, total = differing + int((apart > 0).sum()), total + apart.size
                steps = max(steps, int(apart.max()))
                if flipped:
                    continue
                # Up to the first Site with another code, nothing but the order of sums differs.
                before = max(before, float(np.abs(alone[2 * i] - together[2 * i]).max()) / scale)
                flipped = bool(apart.any())
                at = alone[2 * i][apart > 0] / scale
                margins += np.abs(np.abs(at - np.floor(at)) - 0.5).tolist()
    return {
        "rows": sum(map(len, batches)),
        "codes that differ": differing / total,
        "largest difference of codes": steps,
        "before the first flip, values differ by at most (steps)": before,
        "first flips": len(margins),
        "their largest distance from the middle between two codes (steps)": max(margins, default=0.0),
    }


def main() -> None:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[30, 70, 120, 170, 256])
    parser.add_argument("--batches", type=int, default=4, help="batches of these lengths whose codes are compared")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    if bundle.contract.prefix_slots:
        parser.error("the cache of this bundle begins with the prefix; give a bundle with the prefix in its graph")
    batches = _batches(bundle.encode_prompt(options.text.read_text(encoding="utf-8")), options)
    model = onnx.load(options.bundle / "model.onnx")
    twin, sites = without_rounding(model)
    twin = with_float_weights(twin)
    results: dict[str, Any] = {
        "machine": {"cpu": cpu_description(), "versions": installed_versions(("onnxruntime",))},
        "sites": len(sites),
    }
    for name, graph in (("INT8", model), ("without rounding", twin)):
        session = Graph(graph, bundle.contract, options.threads)
        alone = [session.run([row])[0][0] for row in batches[0]]
        together = [found for (found,) in session.run(batches[0])]
        session = Graph(moved(graph), bundle.contract, options.threads)
        results[name] = {
            "batch and alone": compared(alone, together),
            "one unit in the embedding": compared(alone, [session.run([row])[0][0] for row in batches[0]]),
        }
    names = [name for source, codes, _ in sites for name in (source, codes)]
    traced = Graph(with_outputs(model, names), bundle.contract, options.threads, names)
    results["flips"] = flips(traced, batches, [scale for _, _, scale in sites])
    print(json.dumps(results, indent=1))


def _batches(ids: Sequence[int], options: argparse.Namespace) -> list[list[list[int]]]:
    """Cut different rows from a text."""
    longest, rows = max(options.lengths), len(options.lengths)
    needed = options.batches * rows * longest
    if len(ids) < needed:
        raise SystemExit(f"{options.text} has {len(ids)} tokens, {needed} are needed; give a longer --text")
    at = iter(range(0, needed, longest))
    return [
        [list(ids[(begin := next(at)) : begin + length]) for length in options.lengths] for _ in range(options.batches)
    ]


if __name__ == "__main__":
    main()
