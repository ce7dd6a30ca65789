"""`generate`: stream text from a bundle, without importing torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.generation_options import generation_options, make_params
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import load


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Apply the chat template to the prompt as a user message.")
@click.option("--system", help="System message; requires --chat.")
@generation_options(max_new_tokens=128)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
def command(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    draft: str | None,
    engine: str,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text from PROMPT with BUNDLE. Without PROMPT, the prompt is read from stdin."""
    if prompt is None:
        prompt = sys.stdin.read()
    if system and not chat:
        raise UsageError("--system was given without --chat", hint="add --chat")
    params = make_params(sampling)
    generator = load(bundle, engine, threads)
    options: dict[str, Any] = {"params": params, "max_new_tokens": max_new_tokens, "stop": stop, "draft": draft}
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        events = generator.stream_chat(messages, **options)
    else:
        events = generator.stream(prompt, **options)
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
