"""A tiny random Llama as fixtures: its tokenizer, its float graph behind a prefix, and a bundle of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.runtime import OnnxRuntimeSession, open_session
from cushion_deploy.store import publish, staging_area

TEXT = [
    "The quick brown fox jumps over the lazy dog; 14 wizards box 23 jugs of naïve cider.",
    "Le cœur a ses raisons que la raison ne connaît point. Ελληνικά, русский, 中文, 日本語, 👩‍🚀🚀.",
    "def main(argv): return [x ** 2 for x in argv if x > 0]\n\tprint('done')\n",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'bad' %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}\n"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """Return a trained byte-level BPE tokenizer that puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(t, special=True) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a SentencePiece-like tokenizer: spaces as ``▁``, unknown characters as ``<0xNN>``."""
    letters = [chr(c) for c in range(0x21, 0x7F)]
    words = ["▁", "▁t", "▁th", "▁the", "he", "an", "▁a"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e"), ("a", "n"), ("▁", "a")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Tokenizer:
    """Return the byte-fallback tokenizer."""
    return byte_fallback_tokenizer()


@pytest.fixture(scope="session", params=[byte_level_tokenizer, byte_fallback_tokenizer])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Return one tokenizer after the other."""
    return request.param()


@dataclass(frozen=True)
class Tiny:
    """The model in transformers, and its export."""

    loaded: TorchRunner
    prefix: Prefix
    graph: ExportedGraph
    plain: ExportedGraph

    def session(self, **options: Any) -> OnnxRuntimeSession:
        """Return a fresh session on one thread."""
        return open_session(self.graph, threads=1, **options)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return the byte-level tokenizer."""
    return byte_level_tokenizer()


def write_llama(folder: Path, tokenizer: Tokenizer, positions: int = 96) -> Path:
    """Write a random Llama as a Hugging Face folder; large weights make its choices distinct."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return the folder of a random Llama with 96 positions."""
    return write_llama(tmp_path_factory.mktemp("hf"), tokenizer)


@pytest.fixture(scope="session", params=["baked", "cache"])
def tiny(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tiny:
    """Return the model, its float graph behind a prefix of three tokens, and the graph without one; in both modes."""
    loaded = load_folder(hf_folder, resolve_source(str(hf_folder)))
    prefix = loaded.compute_prefix((7, 1, 300))
    folder = tmp_path_factory.mktemp("graph")
    model, form = (loaded.spec, loaded.weights), GraphForm(quantized=False, prefix=request.param)
    graph = export_graph(*model, Quantization(prefix, QuantScheme()), form, folder)
    assert graph.contract.prefix_mode == request.param
    empty = Quantization(Prefix.empty(loaded.spec), QuantScheme())
    plain = export_graph(*model, empty, GraphForm(quantized=False), folder, name="plain")
    return Tiny(loaded, prefix, graph, plain)


@pytest.fixture
def session(tiny: Tiny) -> OnnxRuntimeSession:
    """Return a session of the graph with the prefix."""
    return tiny.session()


@pytest.fixture(scope="session")
def bundle_path(tiny: Tiny, hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a published bundle."""
    out: Path = tmp_path_factory.mktemp("bundles") / "tiny"
    with staging_area(out) as staged:
        for source in tiny.graph.files:
            (staged / source.name).write_bytes(source.read_bytes())
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            (staged / name).write_bytes((hf_folder / name).read_bytes())
        (staged / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        (staged / "export.json").write_text(json.dumps(tiny.graph.to_json()))
        publish(staged, out, {}, {})
    return out


@pytest.fixture
def ids() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return 40 token ids, int64 ``[1, 40]``."""
    return np.random.default_rng(5).integers(3, 380, (1, 40))
