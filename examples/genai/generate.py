"""Generate text with a bundle of cushion-deploy in onnxruntime-genai, which brings its own tokenizer.

Needs `pip install onnxruntime-genai` and neither cushion-deploy nor torch. The prefix is in the graph, so
onnxruntime-genai does not need to know of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime_genai as og


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; an absent file is an empty one."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def adds_bos(processor: dict[str, Any] | None, bos: int) -> bool:
    """Return whether the post-processor of a tokenizer.json puts the beginning-of-sequence token before a text."""
    if not processor:
        return False
    if processor["type"] == "Sequence":
        return any(adds_bos(part, bos) for part in processor["processors"])
    first = (processor.get("single") or [{}])[0].get("SpecialToken")
    return bool(first) and processor["special_tokens"][first["id"]]["ids"][:1] == [bos]


def prompt_ids(bundle: Path, tokenizer: og.Tokenizer, text: str) -> list[int]:
    """Return the token ids of a prompt, with the beginning-of-sequence token where the bundle wants it.

    onnxruntime-genai reads no post-processor, so that token is added here. Behind a prefix there is none: the prefix
    takes its place, which `text.json` of the bundle states.
    """
    ids, bos = [int(token) for token in tokenizer.encode(text)], tokenizer.bos_token_id
    if not read_json(bundle / "text.json").get("keep_bos", True):
        return ids[1:] if ids[:1] == [bos] else ids
    wanted = adds_bos(read_json(bundle / "tokenizer.json").get("post_processor"), bos)
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def chat_prompt(tokenizer: og.Tokenizer, message: str) -> str:
    """Return the text of a conversation that begins with one message of a user, by the template of the bundle."""
    return tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": message}]), add_generation_prompt=True)


def generate(model: og.Model, ids: list[int], count: int) -> Iterator[int]:
    """Yield at most ``count`` token ids, each the most probable one, up to and including an end token."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true", help="the prompt is a message of a user")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    given = parse_arguments()
    if not (given.bundle / "genai_config.json").is_file():
        sys.exit(f"error: {given.bundle} has no genai_config.json; give the folder of a bundle")
    context = read_json(given.bundle / "genai_config.json")["model"]["context_length"]
    model = og.Model(str(given.bundle))
    tokenizer = og.Tokenizer(model)
    ids = prompt_ids(given.bundle, tokenizer, chat_prompt(tokenizer, given.prompt) if given.chat else given.prompt)
    if not ids or given.max_new_tokens < 1 or len(ids) + given.max_new_tokens > context:
        sys.exit(
            f"error: {len(ids)} prompt tokens and {given.max_new_tokens} new ones; there must be at least one of each, "
            f"and at most {context} together"
        )
    stream = tokenizer.create_stream()
    for token in generate(model, ids, given.max_new_tokens):
        print(f"{token} " if given.ids else stream.decode(token), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
