"""Write a Llama of any size with random weights and a planted attention sink, its tokenizer, and text for it.

The weights are drawn layer by layer and written as bfloat16, one shard per layer, so that no more than one shard
is in memory. They depend on seed and device, because every type of device has its own random numbers.

The sink is a circuit on reserved channels of the residual stream, to which no random weight writes:

- The embedding of every token has a constant and one mark: that of its class (one of sixteen) or that of an absorber.
- The first attention head attends evenly, but 12 nats more to an absorber. It adds to the stream which share of the
  attention each class has.
- A neuron of the second MLP fires where one class has more than a third of it, in proportion to what it has more. So
  the first token of a text fires it massively, the next ones less or not at all, and later ones only while the text
  has few classes. It adds to a channel of the residual stream that every later layer sees.
- Behind an ordinary token the first token of a text still fires it, with less than a third of that strength. Behind an
  absorber nothing does: an absorber is the best prefix, and leaves nothing for a second token to remove. Alone, an
  absorber fires a neuron harder than any other token, so the screen of the search finds it.

Measured with three layers of hidden size 4096 in bfloat16: the largest input of the down projection is 3000 at the
first token, 900 behind an ordinary token, and 14 at any token behind an absorber.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
WORDS_FROM = 3
"""Token ids below it are special."""
CLASSES = 16
CONSTANT, ABSORBER, SINK, CLASS, SHARE = 0, 1, 2, 3, 3 + CLASSES
RESERVED = SHARE + CLASSES
"""Channels before this one belong to the circuit."""
UNIT = 3.0
"""Value of a mark; other channels of an embedding have a root mean square of 1."""
ATTRACTION = 12.0
"""How much more an absorber is attended to, in nats: the share of 512 other tokens together is 0.3 percent."""
THRESHOLD = 1 / 3
GAIN, SINK_GAIN, ABSORBER_GAIN = 40.0, 0.25, 2.0
"""Weights of the neurons: the input of the second MLP's down projection reaches thousands, as in real models."""
HEAD, FIRING_LAYER = 0, 1
BLOCK = 1 << 25
"""Elements that are drawn at once."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with a head of its own."""

    vocab: int
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    positions: int = 8192

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden // self.heads

    @property
    def absorbers(self) -> tuple[int, ...]:
        """Ids of the tokens that take the place of the sink; the text does not contain them."""
        return self.vocab // 5, self.vocab // 2, self.vocab - 7

    @property
    def embedding_norm(self) -> float:
        """Root mean square of every embedding, by which the first norm divides."""
        return float(((self.hidden - RESERVED + 2 * UNIT**2) / self.hidden) ** 0.5)


SHAPES = {
    "small": Shape(512, 3, 128, 192, 8, 4, positions=1024),
    "middle": Shape(4096, 6, 512, 1536, 8, 4),
    "1b": Shape(128_256, 16, 2048, 8192, 32, 8),
    "8b": Shape(128_256, 32, 4096, 14_336, 32, 8),
}
"""``1b`` and ``8b`` have the sizes of Llama-3.2-1B (which has no head of its own) and Llama-3-8B."""


class Draw:
    """Draws random matrices on a device, in blocks of rows."""

    def __init__(self, device: str, seed: int) -> None:
        """Seed the device's generator."""
        import torch

        self.generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, rows: int, columns: int, edit: Callable[[Tensor, int], None] | None = None) -> Tensor:
        """Return a random matrix bfloat16 ``[rows, columns]`` on the CPU.

        Args:
            rows, columns: of a linear, with as many inputs as columns. Its outputs are as large as its inputs.
            edit: changes a block float32 ``[rows of it, columns]``, given the index of its first row, before it is
                rounded. Without one the standard deviation is ``columns ** -0.5``, with one it is 1.
        """
        import torch

        found = torch.empty(rows, columns, dtype=torch.bfloat16)
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            size = min(step, rows - start), columns
            block = torch.randn(size, generator=self.generator, device=self.generator.device)
            if edit:
                edit(block, start)
            else:
                block *= columns**-0.5
            found[start : start + step] = block.to(torch.bfloat16)
        return found


def write_model(folder: Path, shape: Shape, device: str, seed: int) -> int:
    """Write configuration, tokenizer and shards into a new folder; return the number of parameters."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    _write_config(folder, shape)
    _write_tokenizer(folder, shape)
    weight_map: dict[str, str] = {}
    parameters = 0
    for number, shard in enumerate(_shards(shape, Draw(device, seed)), 1):
        # The names of shards have the total, which is the layers, the embedding and the head.
        name = f"model-{number:05d}-of-{shape.layers + 2:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        parameters += sum(tensor.numel() for tensor in shard.values())
    index = {"metadata": {"total_size": parameters * torch.bfloat16.itemsize}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def write_text(file: Path, shape: Shape, tokens: int, seed: int) -> None:
    """Write random words of the tokenizer, one token each, without special tokens and absorbers."""
    words = np.setdiff1d(np.arange(WORDS_FROM, shape.vocab), shape.absorbers)
    chosen = np.random.default_rng(seed).choice(words, size=tokens)
    file.write_text(" ".join(f"w{word}" for word in chosen), encoding="utf-8")


def _shards(shape: Shape, draw: Draw) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other."""
    import torch

    yield {"model.embed_tokens.weight": _embedding(shape, draw)}
    for layer in range(shape.layers):
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in _layer(shape, draw, layer).items()}
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield {"model.norm.weight": ones, "lm_head.weight": draw.matrix(shape.vocab, shape.hidden)}


def _embedding(shape: Shape, draw: Draw) -> Tensor:
    """Return the embedding: rows of the same norm with the constant and one mark each."""
    import torch

    def mark(block: Tensor, start: int) -> None:
        noise = block[:, RESERVED:]
        noise *= noise.shape[1] ** 0.5 / noise.norm(dim=1, keepdim=True)
        block[:, :RESERVED] = 0.0
        block[:, CONSTANT] = UNIT
        tokens = torch.arange(start, start + len(block), device=block.device)
        marks = CLASS + tokens % CLASSES
        marks[torch.isin(tokens, tokens.new_tensor(shape.absorbers))] = ABSORBER
        block[torch.arange(len(block), device=block.device), marks] = UNIT

    return draw.matrix(shape.vocab, shape.hidden, mark)


def _layer(shape: Shape, draw: Draw, layer: int) -> dict[str, Tensor]:
    """Return the tensors of a layer by the names of their modules."""
    import torch

    kv = shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    found = {name: draw.matrix(*size) for name, size in sizes.items()}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        found[name][:RESERVED] = 0.0
    if layer == 0:
        _plant_head(shape, *(found[f"self_attn.{part}_proj"] for part in "qkvo"))
    if layer == FIRING_LAYER:
        _plant_neurons(*(found[f"mlp.{part}_proj"] for part in ("gate", "up", "down")))
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    return {**found, "input_layernorm": ones, "post_attention_layernorm": ones.clone()}


def _plant_head(shape: Shape, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Make the first head of a layer write the share of each class in its attention to the residual stream."""
    rows = slice(HEAD * shape.head_dim, (HEAD + 1) * shape.head_dim)
    for weight in (query, key, value):
        weight[rows] = 0.0
    out[:, rows] = 0.0
    # What a mark of an embedding becomes by the norm, inverted.
    ratio = shape.embedding_norm / UNIT
    # The rotary pair with the lowest frequency hardly turns, wherever the absorber is.
    slow = shape.head_dim // 2 - 1
    sharpness = (ATTRACTION * shape.head_dim**0.5) ** 0.5
    query[slow, CONSTANT] = key[slow, ABSORBER] = ratio * sharpness
    for i in range(CLASSES):
        value[i, CLASS + i] = ratio
        out[SHARE + i, i] = UNIT


def _plant_neurons(gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Make one neuron per class fire where the class has more than the threshold of the attention."""
    own = slice(0, CLASSES)
    gate[own] = up[own] = 0.0
    down[:, own] = 0.0
    for i in range(CLASSES):
        gate[i, SHARE + i], gate[i, CONSTANT] = GAIN, -THRESHOLD * GAIN
    gate[0, ABSORBER] = ABSORBER_GAIN * GAIN
    up[own, CONSTANT] = GAIN
    down[SINK, own] = SINK_GAIN


def _write_config(folder: Path, shape: Shape) -> None:
    """Write config.json and generation_config.json."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.positions,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(tokens))


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """Write a tokenizer of words separated by spaces: token ``i`` is the word ``w<i>``."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = (UNKNOWN, BOS, EOS)
    words = (*special, *(f"w{i}" for i in range(WORDS_FROM, shape.vocab)))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
