"""How the server's scheduler shares one session: tokens per second and times to tokens by number of clients.

    python bench/serve.py BUNDLE --clients 1,4,8

The scheduler runs without HTTP. Each client sends the next prompt when its answer is complete; all of them begin
differently, so nothing is reused. While the clients of the last row generate, a long prompt arrives: the longest pause
between two tokens of the others shows what it costs them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from cushion_deploy.runtime import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.request import Delivery, SequenceRequest
from cushion_deploy.serve.rows import open_rows
from cushion_deploy.serve.scheduler import Limits, Scheduler

PROMPT, LONG = 32, 512


@dataclass
class Client:
    """The times of what one client received, in seconds of ``perf_counter``."""

    sent: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)

    def receive(self, _: int, delivery: Delivery) -> None:
        """Note a token."""
        if delivery.token is not None:
            self.tokens[-1].append(perf_counter())

    @property
    def firsts(self) -> list[float]:
        """Times to the first token."""
        return [times[0] - sent for sent, times in zip(self.sent, self.tokens, strict=True)]

    @property
    def pauses(self) -> list[float]:
        """Times between tokens."""
        return [later - earlier for times in self.tokens for earlier, later in pairwise(times)]


def measure(scheduler: Scheduler, vocab: int, clients: int, answers: int, new: int, long: bool) -> dict[str, Any]:
    """Return the measurements of one number of clients."""
    random = np.random.default_rng(clients)

    def send(client: Client, length: int, tokens: int) -> None:
        client.sent.append(perf_counter())
        client.tokens.append([])
        prompt = tuple(random.integers(3, vocab, length).tolist())
        # No token ends an answer early, so that all have the same length.
        scheduler.submit([SequenceRequest(prompt, tokens)], client.receive)

    everyone, late = [Client() for _ in range(clients)], Client()
    began = perf_counter()
    for client in everyone:
        send(client, PROMPT, new)
    while scheduler.step():
        if long and not late.sent and len(everyone[0].tokens[0]) > new // 2:
            send(late, LONG, 1)
        for client in everyone:
            if len(client.tokens[-1]) == new and len(client.sent) < answers:
                send(client, PROMPT, new)
    seconds = perf_counter() - began
    pauses = sorted(p for client in everyone for p in client.pauses)
    return {
        "clients": clients,
        "long_prompt": long,
        "tokens_per_second": round(clients * answers * new / seconds, 1),
        "first_token_median": round(median(t for client in everyone for t in client.firsts), 3),
        "pause_median": round(median(pauses), 3),
        "pause_longest": round(pauses[-1], 3),
    }


def main() -> None:
    """Measure, and print a table on stderr and one JSON array on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clients", default="1,2,4,8", help="numbers of clients, separated by commas")
    parser.add_argument("--answers", type=int, default=2, help="answers of each client")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--chunk", type=int, default=128, help="prompt tokens between two decode steps")
    a = parser.parse_args()
    bundle = open_bundle(a.bundle)
    session = open_engine(bundle, a.engine, a.threads)
    numbers = [int(n) for n in a.clients.split(",")]
    rows = open_rows(session, max(numbers) + 1, KvPool(0))
    scheduler = Scheduler(rows, bundle.tokenizer, frozenset(), Limits(chunk=a.chunk))
    vocab, found = bundle.contract.vocab_size, []
    measure(scheduler, vocab, 1, 1, 4, False)  # warm up
    for clients, long in [*((n, False) for n in numbers), (numbers[-1], True)]:
        found.append(measure(scheduler, vocab, clients, a.answers, a.tokens, long))
        print("  ".join(f"{key} {value}" for key, value in found[-1].items()), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
