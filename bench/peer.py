"""One runtime in a process of its own: load a model, then run prompts and single tokens on request.

Started by `peers.py`. The first line of stdin says what to load (:class:`Peer`), every further line is `prefill` or
`decode`; every answer is one line of JSON on stdout. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cushion_deploy.core.dtypes import IntArray


@dataclass(frozen=True)
class Peer:
    """What to load.

    Attributes:
        kind: a key of :data:`RUNTIMES`.
        path: a bundle, a graph, a GGUF file or a folder of transformers.
        threads, batch, prompt, decoded: threads of the runtime, rows, tokens of a prompt and single tokens after it.
        engine: engine of a bundle.
    """

    kind: str
    path: str
    threads: int
    batch: int
    prompt: int
    decoded: int
    engine: str = ""

    @property
    def ids(self) -> IntArray:
        """The prompts, int64 ``[batch, prompt]``; every model of the comparison has as many tokens."""
        return np.random.default_rng(0).integers(5, 4000, (self.batch, self.prompt), dtype=np.int64)


class Runtime(Protocol):
    """A loaded model."""

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts int64 ``[batch, length]``, up to the logits of what follows."""
        ...

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row, int64 ``[batch, 1]``, up to the logits of what follows."""
        ...


class BundleEngine:
    """An engine of a bundle, as `cushion-deploy generate` runs it."""

    def __init__(self, peer: Peer) -> None:
        from cushion_deploy.runtime.bundle import open_bundle
        from cushion_deploy.runtime.engine import open_engine

        self.session = open_engine(open_bundle(Path(peer.path)), peer.engine, threads=peer.threads)

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        self.session.reset()
        self.session.run(ids)

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row."""
        self.session.run(ids)


class PlainOnnxRuntime:
    """A graph in ONNX Runtime with default settings: the whole prompt in one call, logits of all its tokens."""

    def __init__(self, peer: Peer) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = peer.threads, 3
        self.ort = ort
        self.session = ort.InferenceSession(peer.path, options, providers=["CPUExecutionProvider"])
        self.past = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past")}

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        empty = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in self.past.items()}
        self.cache = {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}
        self.length = 0
        self.decode(ids)

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row."""
        begin, self.length = self.length, self.length + ids.shape[1]
        positions = np.tile(np.arange(begin, self.length), (len(ids), 1))
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), self.length), np.int64),
            "position_ids": positions,
        }
        feed = self.cache | {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.past)]
        logits, *present = self.session.run_with_ort_values(names, feed)
        self.cache = dict(zip(self.past, present, strict=True))
        logits.numpy()


class PlainOpenVino:
    """A graph in OpenVINO with its default settings, among them bfloat16 where the processor has it."""

    def __init__(self, peer: Peer) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(peer.path)
        compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": peer.threads})
        self.request = compiled.create_infer_request()
        names = [next(iter(port.get_names())) for port in compiled.inputs]
        self.past = {n: p for n, p in zip(names, compiled.inputs, strict=True) if n.startswith("past")}

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        shapes = {name: port.get_partial_shape() for name, port in self.past.items()}
        self.cache: dict[str, Any] = {
            name: np.zeros((len(ids), shape[1].get_length(), 0, shape[3].get_length()), np.float32)
            for name, shape in shapes.items()
        }
        self.length = 0
        self.decode(ids)

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row."""
        begin, self.length = self.length, self.length + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), self.length), np.int64),
            "position_ids": np.tile(np.arange(begin, self.length), (len(ids), 1)),
        }
        self.request.infer(inputs | self.cache)
        self.cache = {
            name: self.request.get_tensor(name.replace("past_key_values", "present")).data.copy() for name in self.past
        }
        self.request.get_tensor("logits").data[0, -1, 0]


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C API."""

    def __init__(self, peer: Peer) -> None:
        import llama_cpp

        self.api, self.peer = llama_cpp, peer
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(peer.path.encode(), loading)
        running = llama_cpp.llama_context_default_params()
        running.n_ctx = peer.batch * (peer.prompt + peer.decoded + 8)
        running.n_batch = running.n_ubatch = max(512, peer.batch)
        running.n_seq_max = peer.batch
        running.n_threads = running.n_threads_batch = peer.threads
        self.context = llama_cpp.llama_init_from_model(self.model, running)
        if not self.context:
            raise RuntimeError("llama.cpp could not create a context")
        self.batch = llama_cpp.llama_batch_init(running.n_batch, 0, 1)
        self.room = running.n_batch

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.length = 0
        self._run(ids)

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row."""
        self._run(ids)

    def _run(self, ids: IntArray) -> None:
        rows, new = ids.shape
        tokens = [(row, column) for column in range(new) for row in range(rows)]
        for start in range(0, len(tokens), self.room):
            part = tokens[start : start + self.room]
            self.batch.n_tokens = len(part)
            for i, (row, column) in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = int(ids[row, column]), self.length + column
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
                self.batch.logits[i] = column == new - 1
            if self.api.llama_decode(self.context, self.batch):
                raise RuntimeError("llama.cpp could not run the tokens")
        self.length += new
        self.api.llama_get_logits_ith(self.context, -1)[0]


class TorchBfloat16:
    """A folder of transformers in torch, bfloat16, scaled dot-product attention."""

    def __init__(self, peer: Peer) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(peer.threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(peer.path, dtype=torch.bfloat16, use_safetensors=True).eval()

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        self.cache = None
        self.decode(ids)

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row."""
        with self.torch.inference_mode():
            found = self.model(self.torch.from_numpy(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.past_key_values


class Genai:
    """A bundle in onnxruntime-genai, by its ``genai_config.json``."""

    def __init__(self, peer: Peer) -> None:
        import onnxruntime_genai as genai

        self.genai, self.peer = genai, peer
        config = genai.Config(peer.path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": peer.threads}}}}))
        self.model = genai.Model(config)

    def prefill(self, ids: IntArray) -> None:
        """Start anew with prompts."""
        search = self.genai.GeneratorParams(self.model)
        length = self.peer.prompt + self.peer.decoded + 8
        search.set_search_options(max_length=length, min_length=length, batch_size=len(ids))
        self.generator = self.genai.Generator(self.model, search)
        self.generator.append_tokens(ids.astype(np.int32))
        self.generator.get_logits()

    def decode(self, ids: IntArray) -> None:
        """Append a token to each row; in a batch its own choice, because it accepts no tokens after the prompts."""
        if len(ids) > 1:
            self.generator.generate_next_token()
        else:
            self.generator.append_tokens(ids.astype(np.int32))
        self.generator.get_logits()


RUNTIMES = {
    "bundle": BundleEngine,
    "onnxruntime": PlainOnnxRuntime,
    "openvino": PlainOpenVino,
    "llama.cpp": LlamaCpp,
    "torch": TorchBfloat16,
    "genai": Genai,
}
"""Name of a kind of peer to how it runs."""


def main() -> None:
    """Serve one peer."""
    # Libraries print to stdout what is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    peer = Peer(**json.loads(sys.stdin.readline()))
    begin = time.perf_counter()
    runtime: Runtime = RUNTIMES[peer.kind](peer)
    answer(load=time.perf_counter() - begin)
    for line in sys.stdin:
        ids, times = peer.ids, []
        steps = [ids] if line.strip() == "prefill" else [ids[:, i : i + 1] for i in range(peer.decoded)]
        for step in steps:
            begin = time.perf_counter()
            (runtime.prefill if line.strip() == "prefill" else runtime.decode)(step)
            times.append(time.perf_counter() - begin)
        answer(seconds=times, peak=_peak())


def _peak() -> int:
    from cushion_deploy.core.host import own_peak_memory

    return own_peak_memory()


if __name__ == "__main__":
    main()
