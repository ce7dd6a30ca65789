"""`generate`: stream text from a bundle, without importing torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import SamplingParams, load


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Apply the chat template to the prompt as a user message.")
@click.option("--system", help="System message; requires --chat.")
@click.option(
    "--max-new-tokens", type=int, default=128, show_default=True, help="Maximum number of tokens to generate."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Sampling temperature; 0 for greedy decoding."
)
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Sample from the k most probable tokens; 0 for all."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most probable tokens whose probabilities sum to this value.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Drop tokens below this fraction of the highest probability.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Values above 1 make tokens that have already occurred less probable.",
)
@click.option("--seed", type=int, help="Random seed.")
@click.option("--stop", multiple=True, help="Text that ends the generation; repeatable.")
@click.option("--engine", default="onnxruntime", show_default=True, help=f"Engine to run on: {', '.join(ENGINES)}.")
@click.option("--threads", type=int, help="Threads of an engine on the CPU. Default: one per physical core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
def command(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    engine: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Generate text from PROMPT with BUNDLE. Without PROMPT, the prompt is read from stdin."""
    if prompt is None:
        prompt = sys.stdin.read()
    if system and not chat:
        raise UsageError("--system was given without --chat", hint="add --chat")
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    generator = load(bundle, engine, threads)
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        events = generator.stream_chat(messages, params=params, max_new_tokens=max_new_tokens, stop=stop)
    else:
        events = generator.stream(prompt, params=params, max_new_tokens=max_new_tokens, stop=stop)
        if not as_json:
            click.echo(prompt, nl=False)
    text, ids = "", []
    for event in events:
        text += event.text
        ids.append(event.token_id)
        if not as_json:
            click.echo(event.text, nl=False)
        last = event
    if as_json:
        usage = vars(last.usage) if last.usage else None
        click.echo(json.dumps({"text": text, "token_ids": ids, "finish_reason": last.finish_reason, "usage": usage}))
        return
    click.echo()
    if last.usage and last.usage.new_tokens > 1 and sys.stderr.isatty():
        # The first token is part of the prefill.
        rate = (last.usage.new_tokens - 1) / max(last.usage.decode_seconds, 1e-9)
        click.echo(f"[{last.usage.new_tokens} tokens, {rate:.1f} tokens/s, {last.finish_reason}]", err=True)
