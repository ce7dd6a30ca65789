"""Entry point of the command line: the commands, and the message and exit code of each kind of error."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from tempfile import gettempdir
from typing import NoReturn

import click
from click.exceptions import NoArgsIsHelpError
from click.shell_completion import CompletionItem

from cushion_deploy.cli import stopping
from cushion_deploy.cli.help import WIDTH
from cushion_deploy.cli.terminal import require_utf8
from cushion_deploy.cli.version import show_version
from cushion_deploy.dependencies import EXTRAS_OF, require_versions
from cushion_deploy.errors import EXTRAS, CushionError, ExitCode, UsageError, missing_module
from cushion_deploy.printable import controls_visible
from cushion_deploy.store.files import DISK_FULL, free_bytes, human_bytes, no_temporary_root

GROUPS = {
    "Build a bundle": {
        "doctor": "Check this installation, or a model before it is built.",
        "build": "Build an INT8 bundle of a model.",
        "search": "Search for the prefix (CushionCache) of a model.",
        "tune": "Train the keys and values of a prefix.",
        "calibrate": "Calibrate static activation scales with a prefix.",
        "export": "Export a model as an ONNX graph with Q/DQ nodes.",
        "engine": "Compile a bundle or a graph for an engine.",
        "clean": "Remove finished stages from a work folder.",
    },
    "Check a bundle": {
        "verify": "Verify every file of a bundle, and its signature.",
        "inspect": "Show the contents of a bundle, prefix or scales file.",
        "report": "Show what the build of a bundle measured.",
        "parity": "Check that a bundle computes what was evaluated.",
        "eval": "Measure perplexity and zero-shot accuracy.",
        "bench": "Measure speed, beside floating point.",
        "study": "Reproduce the tables and figures of the paper.",
    },
    "Run a bundle": {
        "generate": "Continue a prompt, or answer a file of prompts.",
        "chat": "Chat in the terminal.",
        "serve": "Serve an OpenAI-compatible API and a chat page.",
    },
    "Ship a bundle": {
        "sign": "Sign a bundle with a private key.",
        "push": "Upload a bundle to the Hugging Face hub.",
    },
    "Shell": {
        "completion": "Print the script for completion in bash, zsh or fish.",
    },
}
"""The commands under their headings, each with a line of help."""
VERBS = {verb: text for verbs in GROUPS.values() for verb, text in verbs.items()}


KEEPS_STAGES = frozenset(("build", "search", "tune", "calibrate", "export", "study"))
"""Commands that keep what they have finished in the work folder, and go on from there after an interruption."""


class LazyGroup(click.Group):
    """Imports the module of a command when it is used, so that `generate` does not load the libraries of `build`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the pipeline."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command and return it; None if there is no such command."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"cushion_deploy.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"cushion_deploy.cli.{cmd_name}.command is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with; raises UsageError if there is none."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            similar = get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean `cushion-deploy {similar[0]}`?" if similar else "`cushion-deploy --help` lists them"
            raise UsageError(f"there is no command '{args[0]}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        longest = max(map(len, VERBS))
        for heading, verbs in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{verb:<{longest}}", text) for verb, text in verbs.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of commands without importing them: a shell waits for the answer."""
        commands = [CompletionItem(verb, help=text) for verb, text in VERBS.items() if verb.startswith(incomplete)]
        # click's own completion of options, without its completion of commands, which imports all of them.
        return commands + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=show_version,
    help="Show the versions of cushion-deploy and its libraries, and exit.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show more messages on stderr.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Build language models in static per-tensor INT8 (W8A8), run them, and prove what they compute.

    \b
    cushion-deploy doctor                         what is installed, and what is missing
    cushion-deploy build --model MODEL --output OUT
    cushion-deploy chat OUT

    `cushion-deploy COMMAND --help` describes a command and gives examples.

    Exit codes: 0 success, 1 a check failed, 2 bad input, 3 a dependency is missing, 4 corrupt or untrusted file, 70 a
    bug, 130/143 interrupted.
    """  # noqa: D301 - click reads \b as: do not wrap this paragraph
    # A package that is too old is named now, and not by an error in the middle of a build.
    require_versions(*EXTRAS_OF.get(ctx.invoked_subcommand or "", ()))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "huggingface_hub", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its exit code; the arguments default to those of the process."""
    # Set before transformers is imported: its progress bars would interleave with ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It sets the level of its logger when it is imported, and then names every retry of a request, twice.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Before torch is imported: its threads wait for each other by spinning, which on a busy machine takes most of the
    # time. With this many turns they are as fast on a quiet machine, and 2 to 4 times as fast on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    stopping.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A locale without the characters that a model writes shows them as escapes, as stderr does.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are printed on stderr."""
    try:
        require_utf8(arguments)
        result = cli.main(arguments, prog_name="cushion-deploy", standalone_mode=False)
        return result if isinstance(result, int) else ExitCode.OK
    except (KeyboardInterrupt, click.Abort):
        return _stopped(signal.SIGINT, arguments)
    except stopping.Terminated:
        return _stopped(signal.SIGTERM, arguments)
    except SystemExit as e:
        # click itself exits only when the reader of stdout has closed the pipe, as `head` does. That is neither
        # success nor failure, since the result was not read; shells expect 128 + SIGPIPE.
        if e.code != 1:
            raise
        return ExitCode.BROKEN_PIPE
    except Exception as e:
        number = stopping.received()
        return _stopped(number, arguments) if number else _failed(e)


def _failed(error: Exception) -> int:
    """Report an error and return its exit code."""
    if isinstance(error, CushionError):
        return _refused(error)
    if isinstance(error, click.ClickException):
        return _misused(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return _refused(missing_module(error.name))
    if isinstance(error, OSError):
        if unusable := no_temporary_root(error):
            return _refused(unusable)
        if error.errno in DISK_FULL:
            return _no_room(error)
        if error.errno == errno.ENAMETOOLONG:
            path = os.fsdecode(error.filename or "")
            return _refused(
                UsageError(f"a name in the path {path[:60]}... is too long for a file", hint="check the path")
            )
    return _bug(error)


def _misused(error: click.ClickException) -> int:
    """Report a mistake in the call."""
    if isinstance(error, NoArgsIsHelpError):
        _print_error(error.format_message())
        return ExitCode.USAGE
    message = error.format_message().rstrip(".")
    _print_error(f"error: {message[:1].lower()}{message[1:]}")
    _print_error(f"  -> {_usage_hint(error)}")
    return ExitCode.USAGE


def _usage_hint(error: click.ClickException) -> str:
    """Say how the command that was called is used."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return "`cushion-deploy --help` lists the commands"
    usage = context.get_usage().replace("Usage: ", "usage: ")
    if isinstance(error, click.NoSuchOption) and not error.possibilities and context.info_name == "generate":
        return f"{usage}; text that begins with a dash goes behind --, as in: generate -- BUNDLE -1"
    return f"{usage}; `{context.command_path} --help` describes it"


def _refused(error: CushionError) -> int:
    _print_error(f"error: {error.message}")
    _print_error(f"  -> {error.hint}")
    return error.exit_code


def _no_room(error: OSError) -> int:
    """Report a full disk behind a file that is not one of the product's own, such as the one stdout goes to."""
    name = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
    folders = [Path.cwd()]
    with suppress(OSError):  # none of them can be written to
        folders.append(Path(gettempdir()))
    rooms = [f"{folder}: {human_bytes(free_bytes(folder))} free" for folder in folders]
    _print_error(f"error: cannot write{name or ' a file'}: {error.strerror} ({', '.join(rooms)})")
    _print_error("  -> free some space where stdout or the output goes, and run again (finished stages are kept)")
    return ExitCode.USAGE


def _stopped(number: int, arguments: list[str]) -> int:
    """Report that a signal ended the command."""
    word, code = (
        ("terminated", ExitCode.TERMINATED) if number == signal.SIGTERM else ("interrupted", ExitCode.INTERRUPTED)
    )
    _print_error(f"{word}{_how_to_go_on(arguments)}")
    return code


def _how_to_go_on(arguments: list[str]) -> str:
    """Say how a command that keeps its finished stages goes on; nothing of one that has none."""
    verb = next((argument for argument in arguments if argument in VERBS), "")
    if verb not in KEEPS_STAGES:
        return ""
    return "; finished stages are kept: run the same command again to go on from there"


def _bug(error: Exception) -> int:
    _print_error("".join(traceback.format_exception(error)).rstrip())
    _print_error(f"error: {type(error).__name__}: {error}")
    _print_error("  -> this is a bug in cushion-deploy; please report it with the traceback above")
    return ExitCode.BUG


def _print_error(text: str) -> None:
    print(controls_visible(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
