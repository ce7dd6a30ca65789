"""Tiny Llamas that every test shares: a random one, one with a planted attention sink, and the real SmolLM2."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from cushion_deploy.families import family_for_model_type
from cushion_deploy.modeling.gguf import convert_gguf
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

# A runner that starts this in the background has SIGINT ignored, and children inherit that: the tests that interrupt
# a real process would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests neither read nor write the user's digest cache, in this process or in those that they start.
os.environ["CUSHION_CACHE_DIR"] = ""

SMOLLM2 = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = [
    "A few semantically empty tokens become attention sinks and carry very large activations.",
    "The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone by then.",
    "When nothing else is worth attending to, a head attends to the first token of the text.",
]
BOS, EOS = 1, 2
TinyWriter = Callable[..., Path]

# Models this small gain nothing from threads, and lose much to them on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def subnormals() -> Iterator[None]:
    """Give the thread its subnormal numbers back, which the first ONNX Runtime session takes for good."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def tiny_tokenizer() -> Tokenizer:
    """Return a trained byte-level BPE tokenizer of 320 tokens that puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def write_tiny(
    folder: Path, edit: Callable[[Any], None] | None = None, model_type: str = "llama", **config: Any
) -> Path:
    """Write a random model of three layers as a Hugging Face folder, and return the folder.

    Args:
        folder: where to.
        edit: changes the module before it is saved.
        model_type: of its configuration.
        config: overrides of the configuration.
    """
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    known = {key: value for key, value in settings.items() if hasattr(usual, key)}
    # pad_token_id, because the default of some configurations is outside of a vocabulary this small.
    module = AutoModelForCausalLM.from_config(kind(**{**known, "pad_token_id": None, **config}))
    if edit:
        with torch.no_grad():
            edit(module)
    module.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_writer() -> TinyWriter:
    """Return :func:`write_tiny`, for tests that need a variant or a folder to damage."""
    return write_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama: no sink; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> TorchRunner:
    """Return the random Llama, loaded."""
    return load_folder(tiny_folder, resolve_source(str(tiny_folder)))


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama of 87 million parameters, 346 MB in float32; not to be changed."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10, "head_dim": 64}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    rest = {"initializer_range": 0.02, "max_position_embeddings": 1024}
    return write_tiny(tmp_path_factory.mktemp("large"), **shape, **heads, **rest)


@dataclass(frozen=True)
class Plant:
    """A sink that was written into a model on purpose.

    Each token that is no absorber belongs to one of four classes. A token that attends to its own class alone
    fires a neuron of the MLP of ``layer``: so does every first token of a text, and hardly any later one. An
    absorber draws the attention of everything behind it and contributes nothing, so nothing fires behind it;
    itself it fires harder than any other token.

    Attributes:
        absorbers: token ids.
        layer: whose ``mlp.down`` input becomes massive.
        massive: a magnitude that only fired neurons reach.
    """

    absorbers: tuple[int, ...]
    layer: int
    massive: float

    def token_class(self, token: int) -> int:
        """Return the class of a token that is no absorber."""
        return token % 4


PLANT = Plant(absorbers=(65, 97, 171), layer=1, massive=100.0)
_CONSTANT, _CLASS, _ABSORBER, _MEAN, _DRAWN, _SINK, _BALANCE, _RESERVED = 0, 1, 5, 6, 10, 11, 12, 13
_UNIT = 3.0


class Circuits:
    """The weights of a random model of the tiny shape, by their part in the computation; views to be written to."""

    def __init__(self, module: Any) -> None:
        """Look the parts up in the family's description."""
        self.module, config = module, module.config
        self.family = family_for_model_type(config.model_type)
        self.heads = config.num_attention_heads
        self.kv = getattr(config, "num_key_value_heads", None) or self.heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.depth = config.num_hidden_layers
        self.embedding = module.get_input_embeddings().weight

    def linears(self, layer: int, site: int) -> list[torch.Tensor]:
        """Return the weights ``[out, in]`` of the linears of a Site by its place in the layer, 0 to 3."""
        path, rule = self.family.layer(layer), self.family.sites[site]
        modules = [self.module.get_submodule(f"{path}.{linear}") for linear in rule.linears]
        return [m.weight.T if isinstance(m, Conv1D) else m.weight for m in modules]

    def head(self, layer: int, part: int, head: int) -> torch.Tensor:
        """Return the rows of a head of query, key or value (part 0, 1, 2)."""
        weights, dim = self.linears(layer, 0), self.dim
        if self.family.qkv == "interleaved":
            start = (3 * head + part) * dim
            return weights[0][start : start + dim]
        if len(weights) == 3:
            return weights[part][head * dim : (head + 1) * dim]
        start = ((0, self.heads, self.heads + self.kv)[part] + head) * dim
        return weights[0][start : start + dim]

    def up(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what goes through the activation, and what it is multiplied with where the MLP is gated."""
        weights = self.linears(layer, 2)
        if not self.family.gated:
            return weights[0], None
        gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
        return gate, up

    def norm(self, path: str | None) -> torch.Tensor:
        """Return the weight of a norm of the first layer."""
        weight: torch.Tensor = self.module.get_submodule(f"{self.family.layer(0)}.{path}").weight
        return weight


def plant_sink(module: Any) -> None:
    """Write the circuit of :class:`Plant` into a random model of the tiny shape, on reserved channels."""
    parts = Circuits(module)
    embedding, family = parts.embedding, parts.family
    noise = embedding[:, _RESERVED:]
    noise -= noise.mean(dim=1, keepdim=True)
    noise *= 8.0 / noise.norm(dim=1, keepdim=True)
    embedding[:, :_RESERVED] = 0.0
    embedding[:, _CONSTANT], embedding[:, _BALANCE] = _UNIT, -2 * _UNIT
    for token in range(len(embedding)):
        marked = _ABSORBER if token in PLANT.absorbers else _CLASS + PLANT.token_class(token)
        embedding[token, marked] = _UNIT
    # Every row has the same norm and no mean now, hence the same divisor in the first norm.
    ratio = float(embedding[0].square().mean().sqrt()) / _UNIT
    unit = 1 / ratio if family.embedding_norm else _UNIT
    if family.scaled_embedding:
        unit *= module.config.hidden_size**0.5
    if family.position_embedding:
        module.get_submodule(family.position_embedding).weight.zero_()
    for layer in range(parts.depth):
        for site in (1, 3):
            parts.linears(layer, site)[0][:_RESERVED] = 0.0
    # One query head attends evenly, but 12 nats more to an absorber. The slowest rotary pair hardly turns; with
    # ALiBi it is the last head that hardly minds the distance.
    alone = family.positions == "alibi"
    head, group, slow = (parts.heads - 1 if alone else 0), (parts.heads - 1 if alone else 0), parts.dim // 2 - 1
    query, key, value = (parts.head(0, part, index) for part, index in ((0, head), (1, group), (2, group)))
    for weight in (query, key, value):
        weight.zero_()
    sharpness = (12 * parts.dim**0.5) ** 0.5
    if family.norm_of_all_heads:
        # The same with the one channel of all heads together.
        for weight, heads, index, path in zip(
            parts.linears(0, 0),
            (parts.heads, parts.kv),
            (head, group),
            (family.query_norm, family.key_norm),
            strict=False,
        ):
            weight.zero_()
            parts.norm(path)[index * parts.dim + slow] = sharpness / (heads * parts.dim) ** 0.5
        query[slow, _CONSTANT] = key[slow, _ABSORBER] = 1.0
    elif family.query_norm:
        # These norms make the one channel as large as the root of the head size, whatever stands there.
        query[slow, _CONSTANT] = key[slow, _ABSORBER] = 1.0
        for path in (family.query_norm, family.key_norm):
            parts.norm(path)[slow] = sharpness / parts.dim**0.5 - family.norm_offset
    else:
        query[slow, _CONSTANT] = key[slow, _ABSORBER] = ratio * sharpness
    out = parts.linears(0, 1)[0]
    out[:, head * parts.dim : (head + 1) * parts.dim] = 0.0
    for i in range(5):
        value[i, _CLASS + i] = ratio if family.attention_norm else 1 / _UNIT
        out[_MEAN + i, head * parts.dim + i] = unit
    whole = unit
    if family.attention_post_norm:
        # It makes what attention adds as large as the root of the hidden size: nothing else may be in it.
        out[_RESERVED:] = 0.0
        whole = module.config.hidden_size**0.5
    for i in range(4):
        # Fires where the mean over what is attended to exceeds 0.8 of one class. A norm of that mean makes 30 of 48
        # tokens 0.94, which the text of a family without windows must not exceed.
        share = 0.97 if family.attention_post_norm and not family.attention_norm else 0.8
        bent, factor = parts.up(PLANT.layer)
        down = parts.linears(PLANT.layer, 3)[0]
        gain = 60.0 if family.gated else 2000.0
        bent[i] = 0.0
        bent[i, _MEAN + i], bent[i, _CONSTANT] = gain, -share * gain * whole / unit
        if factor is not None:
            factor[i] = 0.0
            factor[i, _CONSTANT] = 60.0
        down[:, i] = 0.0
        down[_SINK, i] = 0.25
    bent[0, _ABSORBER] = 1.5 * gain * whole / unit


@pytest.fixture(scope="session")
def sink_planter() -> Callable[[Any], None]:
    """Return :func:`plant_sink`, for models of other families."""
    return plant_sink


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Llama with the planted sink."""
    return write_tiny(tmp_path_factory.mktemp("planted"), plant_sink)


@pytest.fixture(scope="session")
def planted_model(planted_folder: Path) -> TorchRunner:
    """Return the Llama with the planted sink, loaded."""
    return load_folder(planted_folder, resolve_source(str(planted_folder)))


@pytest.fixture(scope="session")
def plant() -> Plant:
    """Return what was planted into ``planted_model``."""
    return PLANT


@pytest.fixture(scope="session")
def plain_ids() -> Any:
    """Return 600 random token ids, int64 ``[600]``, without special tokens and without absorbers."""
    ids = np.random.default_rng(11).integers(3, 320, 900)
    return ids[~np.isin(ids, PLANT.absorbers)][:600].astype(np.int64)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, or skip."""
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2.name} is not in .models")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2 as a Hugging Face folder, converted once a session."""
    folder: Path = tmp_path_factory.mktemp("smollm2")
    convert_gguf(resolve_source(str(smollm2_gguf)), folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, smollm2_folder: Path) -> TorchRunner:
    """Return SmolLM2, loaded."""
    return load_folder(smollm2_folder, resolve_source(str(smollm2_gguf)))
