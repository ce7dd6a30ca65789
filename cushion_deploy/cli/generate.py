"""`generate`: stream text from a bundle, without importing torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.bundle_options import RequiredSignature, bundle_argument, open_named, signature_options
from cushion_deploy.cli.generation_options import generation_options, make_params
from cushion_deploy.cli.help import FILE, json_option, option, verb
from cushion_deploy.cli.output import require_parent
from cushion_deploy.cli.terminal import echo_generated, echo_remarks, read_stdin
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import TextGenerator, TokenEvent
from cushion_deploy.runtime.answers import Settings, finished, make_jobs, write_answers
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.draft import make_draft
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.runtime.requests import read_requests


@verb(
    "generate",
    'generate OUT "The capital of France is"',
    'generate OUT "Name three rivers." --chat --temperature 0.7 --seed 1',
    "generate OUT --input prompts.jsonl --output answers.jsonl --batch 8",
)
@bundle_argument
@click.argument("prompt", required=False)
@option("--chat", heading="Generation", is_flag=True, help="Send PROMPT as a user's message through the chat template.")
@option("--system", heading="Generation", metavar="TEXT", help="System message. Requires --chat.")
@generation_options(max_new_tokens=128)
@json_option("Print one JSON object at the end instead of streaming text.")
@option(
    *("--input", "requests"),
    heading="Files of prompts",
    type=FILE,
    metavar="FILE",
    help='JSON Lines, each {"prompt": ...} or {"messages": [...]}. Requires --output.',
)
@option(
    *("--output", "-o", "answers"),
    heading="Files of prompts",
    type=FILE,
    metavar="FILE",
    help="JSON Lines file for the answers; if it exists, the answers that it lacks are added.",
)
@option(
    "--batch",
    heading="Files of prompts",
    type=click.IntRange(min=1),
    fallback="1",
    help="Prompts of --input that run at once.",
)
@signature_options
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
    requests: Path | None,
    answers: Path | None,
    batch: int | None,
    required: RequiredSignature | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT with BUNDLE; without PROMPT, the text on stdin.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. With --input, every prompt of a file
    is answered, and the answers are written to --output in the same order; the same command continues an interrupted
    run behind the last complete answer.
    """
    params = make_params(sampling)
    if requests or answers:
        _refuse_with_input(prompt=prompt, chat=chat, system=system, draft=draft, json=as_json)
        settings = Settings(params, max_new_tokens, stop, engine)
        _answer_file(partial(open_named, bundle, required), requests, answers, settings, threads, batch or 1)
        return
    if batch:
        raise UsageError("--batch was given without --input", hint="add --input prompts.jsonl --output answers.jsonl")
    if prompt is None:
        prompt = read_stdin()
    if system and not chat:
        raise UsageError("--system was given without --chat", hint="add --chat")
    make_draft(draft)  # an unknown name is an error before the bundle is read
    opened = open_named(bundle, required)
    generator = TextGenerator(opened, open_engine(opened, engine, threads))
    echo_remarks(engine, generator.session)
    options: dict[str, Any] = {"params": params, "max_new_tokens": max_new_tokens, "stop": stop, "draft": draft}
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        _print(generator.stream_chat(messages, **options), as_json)
        return
    events = generator.stream(prompt, **options)
    if not as_json:
        click.echo(prompt, nl=False)
    _print(events, as_json)


def _print(events: Iterator[TokenEvent], as_json: bool) -> None:
    """Stream the text of events, or print all of them as one JSON object."""
    text, ids = "", []
    for event in events:
        text += event.text
        ids.append(event.token_id)
        if not as_json:
            echo_generated(event.text)
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


def _refuse_with_input(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{'PROMPT' if name == 'prompt' else f'--{name}'} cannot be combined with --input",
                hint='leave it out; a line {"messages": [...]} of the input applies the chat template',
            )


def _answer_file(
    open_it: Callable[[], Bundle],
    requests: Path | None,
    answers: Path | None,
    settings: Settings,
    threads: int | None,
    batch: int,
) -> None:
    if requests is None or answers is None:
        raise UsageError(
            f"{'--output' if answers else '--input'} was given without {'--input' if answers else '--output'}",
            hint="give both: --input prompts.jsonl --output answers.jsonl",
        )
    require_parent(answers)
    lines = read_requests(requests)
    if os.path.exists(answers) and answers.samefile(requests):
        raise UsageError(f"--input and --output are the same file, {requests}", hint="give another --output")
    bundle = open_it()
    jobs = make_jobs(bundle, lines, settings)
    done, _ = finished(answers, jobs)
    if done < len(jobs):
        generator = TextGenerator(bundle, open_engine(bundle, settings.engine, threads))
        echo_remarks(settings.engine, generator.session)
        for count in write_answers(generator, jobs, settings, answers, batch):
            if sys.stderr.isatty():
                click.echo(f"\r{count} of {len(jobs)} answers", nl=False, err=True)
    click.echo(f"{answers}: {len(jobs)} answers, {done} of them from an earlier run")
