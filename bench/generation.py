"""Measure what generation saves: a draft, the cache of a conversation, and batches.

    python bench/generation.py BUNDLE --tokens 120 --rounds 3 --threads 1

Every pair takes turns in every round; a ratio is the median over rounds. Whether the tokens are the same is part of the
result. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from cushion_deploy.core.host import cpu_description, installed_versions
from cushion_deploy.runtime import TextGenerator, load
from cushion_deploy.runtime.batch import generate_batch

ARTICLE = (
    "The city council of Marlow voted on Tuesday to close the old bridge over the river Tern for repairs. They take "
    "fourteen months. The bridge, which was built in 1891, carries about nine thousand vehicles a day, most of them on "
    "their way to the industrial park on the eastern bank. Engineers found cracks in three of the five piers during an "
    "inspection in March. Traffic will be led over the motorway bridge, four kilometres to the north, and a ferry for "
    "pedestrians and bicycles will run every twenty minutes. Shop owners on Bridge Street fear that they will lose "
    "customers, and the council has promised them a fund of two million euros."
)
CODE = """def read_table(path, separator=","):
    rows = []
    with open(path) as file:
        for line in file:
            fields = line.strip().split(separator)
            rows.append([field.strip() for field in fields])
    return rows
"""
QUESTIONS = {
    "summary": "Summarize this article:\n\n" + ARTICLE,
    "code edit": f"Rename the variable `fields` to `cells` and return the whole code:\n\n```python\n{CODE}```",
    "question": "What should I see on a weekend in Lisbon?",
}


def main() -> None:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    generator = load(options.bundle, threads=options.threads)
    machine = {"cpu": cpu_description(), "versions": installed_versions(("onnxruntime",)), "threads": options.threads}
    found = {
        "machine": machine,
        "draft": {name: _draft(generator, text, options) for name, text in QUESTIONS.items()},
        "second turn": _second_turn(generator, options),
        "batch": _batch(generator, options),
    }
    print(json.dumps(found, indent=1))


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _draft(generator: TextGenerator, text: str, options: Any) -> dict[str, Any]:
    """Time decoding with and without prompt lookup."""
    seconds: dict[str | None, list[float]] = {None: [], "ngram": []}
    answers = {}
    for _ in range(options.rounds):
        for name, times in seconds.items():
            answers[name] = generator.chat(_ask(text), max_new_tokens=options.tokens, draft=name)
            times.append(answers[name].usage.decode_seconds)
    usage = answers["ngram"].usage
    ratios = [plain / drafted for plain, drafted in zip(seconds[None], seconds["ngram"], strict=True)]
    return {
        "same tokens": answers[None].token_ids == answers["ngram"].token_ids,
        "tokens": usage.new_tokens,
        "guessed": usage.drafted_tokens,
        "right": usage.accepted_tokens,
        "times as fast": {"median": statistics.median(ratios), "rounds": ratios},
    }


def _second_turn(generator: TextGenerator, options: Any) -> dict[str, Any]:
    """Time the prefill of a second turn with and without the cache of the first."""
    first = _ask(QUESTIONS["summary"])
    turns: dict[bool, list[float]] = {False: [], True: []}
    tokens = {}
    for _ in range(options.rounds):
        for reuse, times in turns.items():
            said = "".join(e.text for e in generator.stream_chat(first, max_new_tokens=options.tokens, reuse=reuse))
            then = [*first, {"role": "assistant", "content": said}, *_ask("Shorter, please.")]
            events = list(generator.stream_chat(then, max_new_tokens=8, reuse=reuse))
            tokens[reuse], usage = [e.token_id for e in events], events[-1].usage
            times.append(usage.prefill_seconds if usage else 0.0)
    return {
        "same tokens": tokens[False] == tokens[True],
        "prompt tokens": usage.prompt_tokens if usage else None,
        "of them cached": usage.cached_tokens if usage else None,
        "prefill seconds": {str(reuse): statistics.median(times) for reuse, times in turns.items()},
    }


def _batch(generator: TextGenerator, options: Any) -> dict[str, Any]:
    """Time the questions together and one after the other."""
    prompts = [generator.bundle.encode_chat(_ask(text)) for text in QUESTIONS.values()]
    ends = generator.bundle.eos_token_ids
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(options.rounds):
        began = time.perf_counter()
        alone = [generator.chat(_ask(text), max_new_tokens=options.tokens) for text in QUESTIONS.values()]
        middle = time.perf_counter()
        limits = {"stop_ids": ends, "max_new_tokens": options.tokens}
        rows = generate_batch(generator.session, generator.bundle.tokenizer, prompts, **limits)
        seconds["alone"].append(middle - began)
        seconds["together"].append(time.perf_counter() - middle)
    answers = [tuple(row.history[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
    same = [one.token_ids == other for one, other in zip(alone, answers, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return {"prompt tokens": [len(p) for p in prompts], "same tokens": same, "times as fast": ratio}


if __name__ == "__main__":
    main()
