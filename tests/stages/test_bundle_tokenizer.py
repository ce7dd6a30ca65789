"""The tokenizer files of a bundle with a prefix give every runtime the tokens that ``generate`` feeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from cushion_deploy.runtime.chat import ChatTemplate, encode_chat, encode_prompt
from cushion_deploy.stages.bundle_tokenizer import describe_text, leave_out_bos

BOS = 1
TEXTS = ["The quick brown fox", " jumps over\nthe lazy dog.", "<s>A text with its own", "", "naïve 中文 \U0001f600"]
CHAT = [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The fox."}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MACRO = (
    "{% macro turn(m, first) %}{{ (bos_token if first else '') + m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endmacro %}\n"
    "  {% for message in messages %}{{ turn(message, loop.first) }}\n{% endfor %}"
)


def sequence(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the layout of Llama 3: a sequence of two post-processors."""
    backend = tokenizer.backend_tokenizer
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def sentencepiece(kind: Any) -> Any:
    """Return a tokenizer of the layout of SentencePiece: words begin with a low line, other bytes have tokens."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyzTA."]
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("o", "v"), ("e", "r"), ("ov", "er"), ("▁", "over"), ("q", "u")]
    vocabulary = {name: i for i, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return kind(vocab=vocabulary, merges=merges, add_bos_token=True, **special)


def of_class(kind: Any) -> Callable[[PreTrainedTokenizerFast], Any]:
    def make(tokenizer: PreTrainedTokenizerFast) -> Any:
        if kind is not GPT2Tokenizer:
            return sentencepiece(kind)
        written = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in written["merges"]]
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return kind(vocab=written["vocab"], merges=merges, add_bos_token=True, **special)

    return make


KINDS: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "a template": lambda tokenizer: tokenizer,
    "a sequence (Llama 3)": sequence,
    "Llama's class": of_class(LlamaTokenizer),
    "Gemma's class": of_class(GemmaTokenizer),
    "GPT-2's class (OPT)": of_class(GPT2Tokenizer),
}


@pytest.fixture(params=KINDS, scope="module")
def pair(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: Any) -> tuple[Path, Path]:
    """Return the folders of a tokenizer that adds <s>, and of the same as a bundle has it."""
    original = tmp_path_factory.mktemp("original")
    made = KINDS[request.param](PreTrainedTokenizerFast.from_pretrained(tiny_folder))
    made.chat_template = TEMPLATE
    made.save_pretrained(original)
    changed = Path(shutil.copytree(original, tmp_path_factory.mktemp("bundle") / "b"))
    assert leave_out_bos(changed)
    return original, changed


def of_generate(original: Path, text: str) -> list[int]:
    """Return the tokens that ``generate`` feeds behind a prefix: those of the model's own tokenizer without <s>."""
    return encode_prompt(Tokenizer.from_file(str(original / "tokenizer.json")), text, BOS, keep_bos=False)


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_what_generate_feeds(text: str, pair: tuple[Path, Path]) -> None:
    original, changed = pair
    assert AutoTokenizer.from_pretrained(original)("x")["input_ids"][0] == BOS, "the model's own tokenizer adds it"
    own = text.startswith("<s>")
    expected = ([BOS] if own else []) + of_generate(original, text)
    assert AutoTokenizer.from_pretrained(changed)(text)["input_ids"] == expected
    assert Tokenizer.from_file(str(changed / "tokenizer.json")).encode(text).ids == expected
    assert of_generate(changed, text) == of_generate(original, text)


@pytest.mark.parametrize("text", TEXTS)
def test_onnxruntime_genai_gets_the_same_tokens(text: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    original, changed = pair
    described = {"model": {"type": "llama", "vocab_size": 320, "context_length": 64, "decoder": {"filename": "x"}}}
    for file in changed.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps(described))
    if (
        text[:1] in (" ", "<")
        and "Llama" in json.loads((changed / "tokenizer_config.json").read_text())["tokenizer_class"]
    ):
        pytest.skip("onnxruntime-genai puts a low line of its own there, with the model's own files as well")
    expected = ([BOS] if text.startswith("<s>") else []) + of_generate(original, text)
    assert og.Tokenizer(og.Config(str(tmp_path))).encode(text).tolist() == expected


@pytest.mark.parametrize("template", [TEMPLATE, MACRO])
def test_chats_become_what_generate_feeds(template: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, _ = pair
    shutil.copytree(original, tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text(template)
    leave_out_bos(tmp_path / "b")
    plain = Tokenizer.from_file(str(original / "tokenizer.json"))
    rendered = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}).render(CHAT)
    assert "<s>" in rendered
    expected = encode_chat(plain, rendered.replace("<s>", "", 1), BOS, keep_bos=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == expected
    own = ChatTemplate((tmp_path / "b" / "chat_template.jinja").read_text(), {"bos_token": "<s>", "eos_token": "</s>"})
    assert (
        encode_chat(Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json")), own.render(CHAT), BOS, keep_bos=False)
        == expected
    )


def test_what_was_changed_is_written_down_once(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "b"))
    changes = leave_out_bos(folder)
    assert changes == "the tokenizer adds no <s>: the prefix takes its place"
    assert json.loads(describe_text(keep_bos=False, changes=changes)) == {"keep_bos": False, "changes": changes}
    before = (folder / "tokenizer.json").read_bytes()
    assert leave_out_bos(folder) == ""
    assert (folder / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_that_adds_nothing_stays_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path)
    before = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert leave_out_bos(tmp_path) == ""
    assert {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")} == before
