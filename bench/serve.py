"""How a server behaves under several clients, over HTTP: first tokens, tokens per second, the second turn of a chat.

    python bench/serve.py BUNDLE --clients 1 4 8 16 [--engines onnxruntime openvino] [--gguf MODEL.gguf]

Each client streams one answer after the other; all prompts begin differently, so nothing is reused. While the clients
of the last row generate, a long prompt arrives: the longest pause between two events of the others shows what it costs
them. The second turn adds a message to a conversation with a long first one. llama.cpp's server is measured in the same
run if ``--gguf`` is given and llama-cpp-python[server] is installed; if it fails, the result has the reason. Engines
other than onnxruntime serve one request at a time; onnxruntime-genai and OpenVINO come without a server. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np
from server import ServerProcess, StartError, bind_free_port, cushion_server, other_server

from cushion_deploy.core.host import cpu_description, installed_versions

WORDS = ("river", "stone", "late", "copper", "garden", "seven", "window", "quiet", "bridge", "salt", "paper", "north")
LLAMA = "llama.cpp"
PACKAGES = ("onnxruntime", "openvino", "uvicorn", "llama-cpp-python")


@dataclass
class Client:
    """When one client received what, in seconds of the monotonic clock."""

    first: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    tokens: int = 0

    async def ask(self, http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> str:
        """Stream an answer and return its text."""
        began, times, text = time.monotonic(), list[float](), ""
        body |= {"stream": True, "temperature": 0}
        async with http.stream("POST", f"/v1/{path}", json=body) as stream:
            stream.raise_for_status()
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                piece = choice.get("text") or choice.get("delta", {}).get("content")
                if piece:
                    times.append(time.monotonic())
                    text += piece
        self.tokens += body["max_tokens"]
        if times:
            self.first.append(times[0] - began)
            self.pauses += [later - earlier for earlier, later in pairwise(times)]
        return text


def prompt(random: np.random.Generator, words: int) -> str:
    """Return a text that begins as no other does."""
    return f"{random.integers(10**9)} " + " ".join(random.choice(WORDS, words))


def _fixed(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is the same in all requests; no token ends an answer early, so that all have the same length."""
    return {"model": server.model, "max_tokens": options.tokens, "logit_bias": dict.fromkeys(options.ends, -100)}


async def clients(server: ServerProcess, number: int, options: argparse.Namespace, *, long: bool) -> dict[str, Any]:
    """Return the measurements of one number of clients."""
    random = np.random.default_rng(number + 100 * long)
    fixed = _fixed(server, options)
    everyone = [Client() for _ in range(number)]
    async with httpx2.AsyncClient(base_url=server.url, timeout=600) as http:

        async def one(client: Client) -> None:
            for _ in range(options.answers):
                await client.ask(http, "completions", {**fixed, "prompt": prompt(random, options.words)})

        async def late() -> None:
            await asyncio.sleep(median([0.5, options.tokens * 0.02]))
            await Client().ask(http, "completions", {**fixed, "prompt": prompt(random, 500), "max_tokens": 1})

        began = time.monotonic()
        await asyncio.gather(*map(one, everyone), *([late()] if long else []))
        seconds = time.monotonic() - began
    first = [t for client in everyone for t in client.first]
    pauses = [p for client in everyone for p in client.pauses]
    return {
        "clients": number,
        "long prompt": long,
        "tokens per second": round(sum(client.tokens for client in everyone) / seconds, 1),
        "first token, median": round(median(first), 3),
        "first token, longest": round(max(first), 3),
        "pause, median": round(median(pauses), 4),
        "pause, longest": round(max(pauses), 3),
    }


async def second_turn(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    """Return the times to the first token of two turns, with a first message of about ``--history`` tokens."""
    random, found = np.random.default_rng(7), list[tuple[float, float]]()
    async with httpx2.AsyncClient(base_url=server.url, timeout=600) as http:
        for _ in range(options.rounds):
            client = Client()
            messages = [{"role": "user", "content": prompt(random, options.history)}]
            body: dict[str, Any] = {**_fixed(server, options), "max_tokens": 16}
            said = await client.ask(http, "chat/completions", {**body, "messages": messages})
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
            await client.ask(http, "chat/completions", {**body, "messages": messages})
            found.append((client.first[0], client.first[1]))
    return {
        "first turn": round(median(a for a, _ in found), 3),
        "second turn": round(median(b for _, b in found), 3),
        "ratio": round(median(b / a for a, b in found), 3),
    }


def measure(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements of one server."""
    warm = argparse.Namespace(**{**vars(options), "answers": 1, "tokens": 4})
    asyncio.run(clients(server, 1, warm, long=False))
    rows = [(n, False) for n in options.clients] + [(options.clients[-1], True)]
    return {
        "clients": [asyncio.run(clients(server, n, options, long=long)) for n, long in rows],
        "turns": asyncio.run(second_turn(server, options)),
        "memory_mb": round(server.rss / 1e6),
    }


@contextmanager
def started(name: str, options: argparse.Namespace) -> Iterator[ServerProcess]:
    """Run one of the servers: llama.cpp's, or this one on an engine."""
    if name != LLAMA:
        flags = ["--max-rows", str(max(options.clients) + 1), "--engine", name]
        with cushion_server(options.bundle, *flags, threads=options.threads) as server:
            yield server
        return
    port, threads = str(bind_free_port()), str(options.threads)
    flags = ["--model", str(options.gguf), "--port", port, "--n_threads", threads, "--n_threads_batch", threads]
    # Without the last option a request breaks off the answer to the one before it.
    flags += ["--n_ctx", "4096", "--interrupt_requests", "false"]
    command = [sys.executable, "-m", "llama_cpp.server", *flags]
    with other_server(command, f"http://127.0.0.1:{port}", str(options.gguf)) as server:
        yield server


def main() -> None:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp's server")
    parser.add_argument("--engines", nargs="+", default=["onnxruntime"], help="engines of the bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--answers", type=int, default=2, help="answers of each client")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--words", type=int, default=20, help="words of a prompt")
    parser.add_argument("--history", type=int, default=1000, help="words of the first turn, each about one token")
    parser.add_argument("--rounds", type=int, default=3, help="conversations")
    parser.add_argument("--ends", nargs="*", default=["2"], help="ids of the tokens that end an answer")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in [*options.engines, *([LLAMA] if options.gguf else [])]:
        try:
            with started(name, options) as server:
                found[name] = measure(server, options)
        except (StartError, httpx2.HTTPError) as e:
            found[name] = {"missing": f"{type(e).__name__}: {e}"}
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    machine = {"cpu": cpu_description(), "versions": installed_versions(PACKAGES), "threads": options.threads}
    print(json.dumps({"machine": machine, "servers": found}, indent=1))


if __name__ == "__main__":
    main()
