"""`chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.bundle_options import RequiredSignature, bundle_argument, open_named, signature_options
from cushion_deploy.cli.generation_options import generation_options, make_params
from cushion_deploy.cli.help import option, verb
from cushion_deploy.cli.stopping import handled
from cushion_deploy.cli.terminal import echo, echo_generated, echo_remarks, stdin_lines, typed_line
from cushion_deploy.errors import CushionError, UsageError
from cushion_deploy.runtime import TextGenerator
from cushion_deploy.runtime.conversation import Conversation
from cushion_deploy.runtime.draft import make_draft
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.runtime.generate import Usage

HELP = """/system TEXT  set the system message; without TEXT, remove it
/reset        forget the conversation, except for the system message
/forget N     forget the N oldest messages with their answers, to make room; one without N
/save FILE    write the conversation to a new file, as one line for `generate --input`
/help         show this
/exit         leave, as Ctrl-D does
A message that begins with a slash is written with two. Ctrl-C stops an answer."""
PROMPT = "> "


@verb(
    "chat", "chat OUT", 'chat OUT --system "Answer in one sentence." --temperature 0.7', "chat org/name < messages.txt"
)
@bundle_argument
@option("--system", heading="Generation", metavar="TEXT", help="System message.")
@generation_options(max_new_tokens=512)
@signature_options
def command(
    bundle: Path,
    system: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    draft: str | None,
    engine: str,
    threads: int | None,
    required: RequiredSignature | None,
    **sampling: Any,
) -> None:
    """Chat with BUNDLE in the terminal.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. Every message is answered with the
    whole conversation in view. In a terminal, Ctrl-C stops an answer and /help lists the commands. From a pipe or a
    file, each line is a message, stdout has the answers only, and the first error ends the program.
    """
    params = make_params(sampling)
    make_draft(draft)  # an unknown name is an error before the bundle is read
    opened = open_named(bundle, required)
    opened.require_chat_template()
    generator = TextGenerator(opened, open_engine(opened, engine, threads))
    echo_remarks(engine, generator.session)
    talk = Conversation(generator, system, params, max_new_tokens, stop, draft)
    if sys.stdin.isatty():
        _in_terminal(talk)
    else:
        _through_a_pipe(talk)


def _through_a_pipe(talk: Conversation) -> None:
    """Read lines until there are no more; an error ends it."""
    for line in stdin_lines():
        if not _handle(talk, line):
            return


def _in_terminal(talk: Conversation) -> None:
    """Read lines until the user leaves; an error is shown and the conversation goes on."""
    click.echo("/help lists the commands.", err=True)
    for line in _lines():
        try:
            if not _handle(talk, line):
                return
        except CushionError as e:
            _show(e)
        except KeyboardInterrupt:
            handled()
            click.echo("\n[stopped]", err=True)


def _show(error: CushionError) -> None:
    echo(f"error: {error.message}\n  -> {error.hint}", err=True)


def _lines() -> Iterator[str]:
    """Yield lines of the terminal until Ctrl-D; Ctrl-C discards the line."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history and editing, where the platform has it)
    while True:
        try:
            yield typed_line(PROMPT)
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            handled()
            click.echo("\n[/exit or Ctrl-D leaves]", err=True)
        except UsageError as e:
            _show(e)


def _handle(talk: Conversation, line: str) -> bool:
    """Run a command or answer a message; return whether to go on."""
    if not line.strip():
        return True
    if line.startswith("/") and not line.startswith("//"):
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise UsageError(f"there is no command '/{name}'", hint="see /help; write // for a message with a slash")
        return COMMANDS[name](talk, rest.strip())
    _answer(talk, line[1:] if line.startswith("//") else line)
    return True


def _answer(talk: Conversation, text: str) -> None:
    usage = None
    with closing(talk.answer(text)) as events:
        for event in events:
            echo_generated(event.text)
            usage, reason = event.usage, event.finish_reason
    click.echo()
    if usage and reason == "length" and talk.is_full(usage):
        click.echo("[cut off: the model has no room for more; /forget or /reset makes some]", err=True)
    if usage and sys.stdin.isatty() and sys.stderr.isatty():
        click.echo(f"[{_summary(usage)}, {reason}]", err=True)


def _summary(usage: Usage) -> str:
    rate = (usage.new_tokens - 1) / max(usage.decode_seconds, 1e-9)
    return (
        f"{usage.new_tokens} tokens, {rate:.1f} tokens/s, "
        f"{usage.prompt_tokens - usage.cached_tokens} of {usage.prompt_tokens} prompt tokens computed"
    )


def _system(talk: Conversation, text: str) -> bool:
    talk.system = text or None
    click.echo("[system message set]" if text else "[system message removed]", err=True)
    return True


def _reset(talk: Conversation, _: str) -> bool:
    talk.reset()
    click.echo("[conversation forgotten]", err=True)
    return True


def _forget(talk: Conversation, number: str) -> bool:
    if not (number or "1").isdecimal() or len(number) > 9:
        raise UsageError(f"/forget has {number[:40]!r}", hint="write /forget 2 for the two oldest messages")
    count = talk.forget(int(number or 1))
    click.echo(f"[{count} {'message' if count == 1 else 'messages'} forgotten, with the answers]", err=True)
    return True


def _save(talk: Conversation, file: str) -> bool:
    if not file:
        raise UsageError("/save has no file", hint="write /save conversation.jsonl")
    talk.save(Path(file).expanduser())
    click.echo(f"[{len(talk.messages)} messages written to {file}]", err=True)
    return True


def _help(_: Conversation, __: str) -> bool:
    click.echo(HELP, err=True)
    return True


def _exit(_: Conversation, __: str) -> bool:
    return False


COMMANDS: dict[str, Callable[[Conversation, str], bool]] = {
    "system": _system,
    "reset": _reset,
    "forget": _forget,
    "save": _save,
    "help": _help,
    "exit": _exit,
}
"""Commands of a conversation; each returns whether it goes on."""
