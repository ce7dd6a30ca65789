"""Load a server with thousands of requests of mixed sizes, some of whose clients leave, and check every answer.

    python bench/load.py BUNDLE --requests 10000 --clients 16

The answers are greedy, and those of each prompt alone are computed beforehand. An answer with other tokens is accepted
only as rounding: computed alone behind the same prompt, each of its tokens must have the log-probability that the
server reported, and be as probable as the best one, both up to ``--tolerance``. The default is for float graphs; INT8
needs 2.6 (`bench/padding.py` says why). Prints JSON, and fails if an answer is wrong or missing, if the log has a line,
or if the memory leaves ``--flat`` around its median after the first tenth of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from expected_answers import Answer, Case, Reference
from server import ServerProcess, cushion_server

from cushion_deploy.core.host import cpu_description, installed_versions


@dataclass
class Load:
    """Clients that send cases until there are no more, and what they saw."""

    server: ServerProcess
    reference: Reference
    cases: list[Case]
    options: argparse.Namespace
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0
    tokens: int = 0
    differing: list[tuple[Case, Answer]] = field(default_factory=list)

    async def run(self) -> None:
        """Send all requests."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.options.clients)
        async with httpx2.AsyncClient(base_url=self.server.url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self.options.clients)))

    async def _client(self, client: httpx2.AsyncClient) -> None:
        while self.sent < self.options.requests:
            number, self.sent = self.sent, self.sent + 1
            if number % max(self.options.requests // 100, 1) == 0:
                self.memory.append((number, self.server.rss))
            random = np.random.default_rng((self.options.seed, number))
            case = self.cases[int(random.integers(len(self.cases)))]
            leaves, streamed = random.random() < self.options.leaving, bool(random.random() < 0.5)
            try:
                if leaves:
                    await self._leave(client, case, streamed, float(random.random()))
                else:
                    self._check(case, await self._answer(client, case, streamed))
            except (httpx2.HTTPError, ValueError, KeyError) as e:
                self._wrong(f"request {number}: {type(e).__name__}: {e}")

    async def _answer(self, client: httpx2.AsyncClient, case: Case, streamed: bool) -> Answer:
        answer, path = Answer(), f"/v1/{case.path}"
        body = {"model": self.server.model, **case.body}
        if not streamed:
            done = await client.post(path, json=body)
            done.raise_for_status()
            answer.add(done.json())
            return answer
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", path, json=body) as stream:
            stream.raise_for_status()
            lines = [line[6:] async for line in stream.aiter_lines() if line]
        for line in lines[:-1]:
            answer.add(json.loads(line))
        if lines[-1] != "[DONE]":
            raise ValueError(f"the stream ends with {lines[-1]}")
        return answer

    async def _leave(self, client: httpx2.AsyncClient, case: Case, streamed: bool, fraction: float) -> None:
        """Close the connection in the middle: after some chunks, or while the answer is computed."""
        self.verdicts["left"] += 1
        body = {"model": self.server.model, **case.body, "stream": streamed}
        try:
            timeout = 600 if streamed else 0.02 + 0.1 * fraction
            async with client.stream("POST", f"/v1/{case.path}", json=body, timeout=timeout) as stream:
                left = int(fraction * case.body["max_tokens"])
                async for _ in stream.aiter_lines():
                    left -= 1
                    if left < 0:
                        return
        except httpx2.TimeoutException:
            return

    def _check(self, case: Case, answer: Answer) -> None:
        self.tokens += len(answer.tokens)
        if answer.text == case.text:
            self._judge(case, answer)
        else:
            self.differing.append((case, answer))  # computed afterwards, not while the server is measured

    def judge_differing(self) -> None:
        """Check the answers with other tokens."""
        for case, answer in self.differing:
            self._judge(case, answer)

    def _judge(self, case: Case, answer: Answer) -> None:
        verdict = self.reference.judge(case, answer, self.options.tolerance)
        if verdict in ("same", "rounding"):
            self.verdicts[verdict] += 1
        else:
            self._wrong(f"{case.path} {case.body}: {verdict}; alone {case.text!r}")

    def _wrong(self, message: str) -> None:
        self.verdicts["wrong"] += 1
        if len(self.wrong) < 10:
            self.wrong.append(message[:500])


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the result, and what is wrong with it."""
    reference = Reference(options.bundle, options.threads, options.longest)
    cases = reference.cases(options.prompts, options.seed)
    flags = ["--kv-pool-mib", str(options.pool), "--max-rows", str(options.rows)]
    with cushion_server(options.bundle, *flags, threads=options.threads) as server:
        load = Load(server, reference, cases, options)
        began = time.monotonic()
        asyncio.run(load.run())
        seconds = time.monotonic() - began
        left = [server.metric(f"cushion_sequences_{kind}") for kind in ("running", "waiting")]
        log = server.log
    load.judge_differing()
    memory = [rss for number, rss in load.memory if number >= options.requests // 10]
    curve = [statistics.median(part) for part in np.array_split([rss for _, rss in load.memory], 10)]
    middle = statistics.median(memory)
    spread = (min(memory) / middle - 1, max(memory) / middle - 1)
    problems = [*load.wrong]
    if sum(load.verdicts.values()) != options.requests:
        problems.append(f"{options.requests - sum(load.verdicts.values())} requests have no answer")
    if any(left):
        problems.append(f"sequences are left running and waiting: {left}")
    if log:
        problems.append(f"the log says: {log[-1000:]}")
    if max(map(abs, spread)) > options.flat:
        problems.append(f"memory moves between {spread[0]:+.1%} and {spread[1]:+.1%} of its median")
    result = {
        "machine": {"cpu": cpu_description(), "versions": installed_versions(("onnxruntime", "uvicorn"))},
        "options": {key: str(value) for key, value in vars(options).items() if key != "bundle"},
        "answers": dict(load.verdicts),
        "requests_per_second": round(options.requests / seconds, 1),
        "tokens_per_second": round(load.tokens / seconds, 1),
        "memory_mb": {"median": round(middle / 1e6, 1), "lowest": spread[0], "highest": spread[1]},
        "memory_mb_by_tenth_of_the_requests": [round(float(rss) / 1e6, 1) for rss in curve],
        "log_lines": len(log.splitlines()),
    }
    return result, problems


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=300, help="different prompts")
    parser.add_argument("--longest", type=int, default=768, help="most tokens of a prompt and its answer")
    parser.add_argument("--leaving", type=float, default=0.05, help="share of clients that leave in the middle")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats; 2.6 for an INT8 graph")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pool", type=int, default=64, help="MiB of keys and values kept; full before it is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flat", type=float, default=0.05, help="how far memory may be from its median")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Print the result; exit code 1 if something is wrong."""
    result, problems = measure(arguments().parse_args())
    print(json.dumps(result, indent=1))
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
