"""Requests with the answers that they get alone, and the judgement of an answer that a server gave: for `load.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.session import context_limit
from cushion_deploy.runtime import TextGenerator, load
from cushion_deploy.runtime.generate import generate
from cushion_deploy.serve.api.token_text import TokenText

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
WORDS = ("the", "river", "naïve", "cœur", "👩‍🚀", "東京", "x = [1, 2]", "why?", "def", "e\u0301", "\n")


@dataclass(frozen=True)
class Case:
    """A request, and the answer that it gets alone."""

    path: str
    body: dict[str, Any]
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: str


@dataclass
class Answer:
    """What a client received."""

    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    def add(self, body: dict[str, Any]) -> None:
        """Append a whole answer or a chunk."""
        self.usage = body.get("usage") or self.usage
        for choice in body["choices"]:
            said = choice.get("message") or choice.get("delta") or choice
            self.text += said.get("content") or said.get("text") or ""
            self.finish = choice["finish_reason"] or self.finish
            found = choice.get("logprobs") or {}
            self.tokens += found.get("tokens") or [one["token"] for one in found.get("content") or ()]
            self.logprobs += found.get("token_logprobs") or [one["logprob"] for one in found.get("content") or ()]


class Reference:
    """The sequential runtime of the same bundle."""

    def __init__(self, bundle: Path, threads: int, longest: int) -> None:
        """Open it."""
        self.generator: TextGenerator = load(bundle, threads=threads)
        self.bundle = self.generator.bundle
        self._room = min(longest, context_limit(self.bundle.contract))
        tokens, self._ids = TokenText(self.bundle.tokenizer), dict[str, list[int]]()
        for token in range(self.bundle.contract.vocab_size):
            self._ids.setdefault(tokens.text_of(token), []).append(token)
        known = self.bundle.tokenizer.get_added_tokens_decoder()
        self._plain = [i for i in range(self.bundle.tokenizer.get_vocab_size()) if i not in known]

    def cases(self, count: int, seed: int) -> list[Case]:
        """Return requests with their answers: prompts of 1 token to most of the context, one in three shared."""
        random, found = np.random.default_rng(seed), list[Case]()
        for number in range(count):
            new = int(random.integers(1, 33))
            if number % 3 == 2 and self.bundle.chat_template is not None:
                words = random.choice(WORDS, int(random.integers(1, 9)))
                messages = [{"role": "user", "content": " ".join(words)}]
                found.append(self._case("chat/completions", {"messages": messages, "logprobs": True}, new, ()))
                continue
            length = int(np.exp(random.uniform(0, np.log(self._room - 34))))
            prompt = random.choice(self._plain, length).tolist()
            if number % 3 and found:  # begins as an earlier one does
                other = found[int(random.integers(len(found)))].prompt_ids
                prompt = [*other[: int(random.integers(1, len(other) + 1))], *prompt][: self._room - 34]
            stop = ("e", "\u0301", "the ") if number % 5 == 0 else ()
            found.append(self._case("completions", {"prompt": prompt, "logprobs": 0}, new, stop))
        return found

    def _case(self, path: str, body: dict[str, Any], new: int, stop: tuple[str, ...]) -> Case:
        ids = body.get("prompt") or self.bundle.encode_chat(body["messages"])
        events = list(
            generate(
                self.generator.session,
                self.bundle.tokenizer,
                ids,
                max_new_tokens=new,
                stop_ids=self.bundle.eos_token_ids,
                stop_strings=stop,
            )
        )
        answer = tuple(e.token_id for e in events)
        body |= {"max_tokens": new, "temperature": 0} | ({"stop": list(stop)} if stop else {})
        chosen, _ = self.scores(tuple(ids), answer)
        finish = FINISH[events[-1].finish_reason or ""]
        return Case(path, body, tuple(ids), answer, tuple(chosen), "".join(e.text for e in events), finish)

    def scores(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
        """Return log-probabilities of the tokens of an answer, and how much more the best ones have, in nats."""
        session = self.generator.session
        session.reset()
        logits = session.run(np.array([[*prompt, *answer[:-1]]]), need_logits="all")
        session.reset()
        assert logits is not None
        of = logits[0, len(prompt) - 1 :].astype(np.float64)
        of -= of.max(axis=1, keepdims=True)
        chosen = of[np.arange(len(answer)), list(answer)]
        return chosen - np.log(np.exp(of).sum(axis=1)), -chosen

    def judge(self, case: Case, answer: Answer, tolerance: float) -> str:
        """Return ``same``, ``rounding``, or what is wrong with an answer."""
        used = {"prompt_tokens": len(case.prompt_ids), "completion_tokens": len(answer.tokens)}
        if {key: answer.usage.get(key) for key in used} != used:
            return f"usage {answer.usage}, expected {used}"
        if answer.text == case.text and len(answer.logprobs) == len(case.logprobs):
            apart = np.abs(np.array(answer.logprobs) - case.logprobs).max()
            if answer.finish == case.finish and apart <= tolerance:
                return "same"
        ids = self._tokens(case.prompt_ids, answer.tokens)
        if not ids:
            return "tokens that the model does not have"
        chosen, behind = self.scores(case.prompt_ids, ids)
        apart = float(np.abs(chosen - answer.logprobs).max())
        if max(apart, float(behind.max())) > tolerance:
            return f"log-probabilities {apart:.3f} apart, tokens {behind.max():.3f} behind: {answer.text!r}"
        length = "length" if len(ids) == case.body["max_tokens"] else "neither"
        expected = "stop" if ids[-1] in self.bundle.eos_token_ids else length
        if answer.finish != expected and "stop" not in case.body:
            return f"it ends with {answer.finish}, expected {expected}"
        return "rounding"

    def _tokens(self, prompt: tuple[int, ...], texts: list[str]) -> tuple[int, ...]:
        """Return the tokens of an answer; of several with the same text, the one that the model prefers there."""
        found: list[int] = []
        for text in texts:
            ids = self._ids.get(text, [])
            if not ids:
                return ()
            found.append(max(ids, key=lambda i: self.scores(prompt, (*found, i))[0][-1]) if len(ids) > 1 else ids[0])
        return tuple(found)
