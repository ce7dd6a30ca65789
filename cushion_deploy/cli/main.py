"""Entry point: the verbs, and how an error becomes words and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from cushion_deploy.errors import EXTRAS, CushionError, ExitCode, missing_module
from cushion_deploy.store.manifest import tool_version

VERBS = {
    "doctor": "Look at a model before a build: sinks, costs, needs, engines.",
    "build": "Model in, verified INT8 bundle out.",
    "search": "Find the prefix (CushionCache) of a model.",
    "tune": "Train the keys and values of a prefix.",
    "calibrate": "Choose smoothing and static activation scales behind a prefix.",
    "export": "Write the ONNX graph with Q/DQ nodes and the prefix.",
    "engine": "Compile a graph for an engine.",
    "parity": "Check that a bundle computes what was evaluated.",
    "eval": "Score a bundle or a model on texts and zero-shot tasks.",
    "bench": "Time a bundle beside floating point.",
    "study": "Measure the paper's tables and figures for a model.",
    "verify": "Check every byte of a bundle against its manifest.",
    "generate": "Generate text with a bundle.",
    "report": "Show the report of a bundle.",
    "inspect": "Show what a bundle, prefix or scales file holds.",
}


class Terminated(BaseException):
    """SIGTERM arrived."""


class LazyGroup(click.Group):
    """Imports the module of a verb only when it is used, so that `generate` never loads what `build` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the work."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb's command."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"cushion_deploy.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"cushion_deploy.cli.{cmd_name}.command is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tool_version(), prog_name="cushion-deploy")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def cli(verbose: bool) -> None:
    """Run a language model in static per-tensor INT8 at the edge, with the proof beside it.

    \b
    cushion-deploy build --model MODEL --precision w8a8 --output OUT
    cushion-deploy generate OUT "The capital of France is"

    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 something is missing,
    4 corrupt or untrusted file, 70 a bug, 130/143 interrupted.
    """  # noqa: D301 - click takes the character for: do not wrap
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "huggingface_hub", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its exit code; the arguments default to those of the process."""
    # Before transformers is imported: its bars would cross ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every failure is reported on stderr."""
    try:
        result = cli.main(arguments, prog_name="cushion-deploy", standalone_mode=False)
        return result if isinstance(result, int) else ExitCode.OK
    except CushionError as e:
        _say(f"error: {e.message}")
        _say(f"  -> {e.hint}")
        return e.exit_code
    except click.ClickException as e:
        e.show(sys.stderr)
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; finished stages are kept, run the same command again to go on")
        return ExitCode.INTERRUPTED
    except Terminated:
        _say("terminated; finished stages are kept, run the same command again to go on")
        return ExitCode.TERMINATED
    except SystemExit as e:
        # click ends the process itself for one thing alone: the reader of our output went away, as `head` does.
        # Neither done nor failed: nobody saw the verdict. 128 + SIGPIPE is what shells expect.
        if e.code != 1:
            raise
        return ExitCode.BROKEN_PIPE
    except ModuleNotFoundError as e:
        if e.name not in EXTRAS:
            return _bug(e)
        missing = missing_module(e.name)
        _say(f"error: {missing.message}")
        _say(f"  -> {missing.hint}")
        return missing.exit_code
    except Exception as e:
        return _bug(e)


def _bug(error: Exception) -> int:
    traceback.print_exception(error, file=sys.stderr)
    _say(f"error: {type(error).__name__}: {error}")
    _say("  -> this is a bug in cushion-deploy; please report it with the lines above")
    return ExitCode.BUG


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
