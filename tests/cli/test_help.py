"""Help: every option under a heading with its default, one wording for one option, examples that are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from cushion_deploy.cli.help import HEADINGS, WIDTH, Command, Option
from cushion_deploy.cli.main import GROUPS, VERBS, cli
from cushion_deploy.cli.options import FLAGS
from cushion_deploy.recipe import Recipe

COMMANDS = {verb: cli.get_command(click.Context(cli), verb) for verb in VERBS}
OWN_MEANING = {
    *("--model", "--recipe", "--seed", "--calib-data", "--eval-data", "--prefix", "--dtype", "--engine", "--tasks"),
    *("--system", "--batch", "--work-dir", "--output", "--json", "--dry-run"),
}
"""Options whose help differs, because what they take or write is the command's own."""

NOTHING_BY_DEFAULT = {
    *("--model", "--recipe", "--scales", "--smoothing", "--kv-scales", "--task-data", "--tls-cert", "--tls-key"),
    *("--junit", "--baseline", "--write-baseline", "--input", "--output", "--system", "--draft"),
    *("--signature", "--public-key"),
}
"""Options that add something: without them there is nothing in its place."""


def options(verb: str) -> list[Option]:
    command = COMMANDS[verb]
    assert isinstance(command, Command)
    return [parameter for parameter in command.params if isinstance(parameter, Option)]


def shown(verb: str, width: int = WIDTH) -> str:
    command = COMMANDS[verb]
    assert command is not None
    return command.get_help(click.Context(command, info_name=verb, terminal_width=width, max_content_width=width))


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_heading_and_the_headings_are_in_order(verb: str) -> None:
    command = COMMANDS[verb]
    assert command is not None
    assert len(options(verb)) == sum(isinstance(p, click.Option) for p in command.params)
    found = [line[:-1] for line in shown(verb).splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    wanted = [heading for heading in HEADINGS if heading in {option.heading for option in options(verb)} | {"Output"}]
    assert [heading for heading in found if heading != "Examples"] == wanted


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "completion"])
def test_examples_are_commands_that_are_accepted(verb: str) -> None:
    command = COMMANDS[verb]
    assert isinstance(command, Command)
    assert any(line.startswith(f"cushion-deploy {verb}") for line in command.examples)
    for line in command.examples:
        assert line in shown(verb)
        name, given, *words = shlex.split(line.split(" > ")[0].split(" < ")[0])
        other = COMMANDS[given]
        assert name == "cushion-deploy"
        assert other is not None
        context = other.make_context(given, words, resilient_parsing=True)
        _, rest, _ = other.make_parser(context).parse_args(list(words))
        assert rest == [], line
        for parameter in other.params:
            assert not parameter.required or context.params[str(parameter.name)] not in (None, ()), line


@pytest.mark.parametrize("verb", VERBS)
def test_every_default_is_shown(verb: str) -> None:
    # Without white space, because a line may end at a hyphen.
    text = re.sub(r"\s+", "", shown(verb))
    for option in options(verb):
        default = option.fallback or ("" if option.is_flag else option.default)
        if isinstance(default, (str, int, float, Path)) and default != "":
            assert re.sub(r"\s+", "", f"[default: {default}") in text, (verb, option.opts[0])
        elif not (option.is_flag or option.required or option.multiple):
            assert option.opts[0] in NOTHING_BY_DEFAULT, (verb, option.opts[0])


def test_the_defaults_of_settings_are_those_of_the_recipe() -> None:
    defaults = {setting.name: setting.default for setting in Recipe.settings()}
    checked = 0
    for option in options("build"):
        setting = FLAGS.get(str(option.name))
        default = defaults[setting] if setting else None
        if isinstance(default, (str, float, int)) and not isinstance(default, bool):
            checked += 1
            assert str(default) in option.fallback, option.opts[0]
        elif isinstance(default, bool):
            assert option.fallback == (option.opts if default else option.secondary_opts)[0].removeprefix("--")
    assert checked >= 8


def test_one_option_has_one_wording() -> None:
    said: dict[str, set[Any]] = {}
    for verb in VERBS:
        for option in options(verb):
            said.setdefault(option.opts[0], set()).add((option.heading, option.metavar, option.help, option.fallback))
    assert {name for name, found in said.items() if len(found) > 1} == OWN_MEANING


def test_the_first_page_lists_every_verb_once(cli: Any) -> None:
    text = cli("--help").out
    for heading, verbs in GROUPS.items():
        assert f"\n{heading}:\n" in text
        for verb, line in verbs.items():
            assert re.search(rf"^  {verb} +{re.escape(line)}$", text, re.MULTILINE), verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_narrow_terminal(verb: str) -> None:
    examples = set(getattr(COMMANDS[verb], "examples", ()))
    wide = [line for line in shown(verb, 80).splitlines() if len(line) > 80 and line.strip() not in examples]
    assert all("completion" in line for line in wide), wide


def test_ranges_are_words() -> None:
    text = "\n".join(shown(verb) for verb in VERBS)
    assert "x>=" not in text
    assert "<=x" not in text
    assert "RANGE" not in text
    assert "[default: 8000; 0 to 65535]" in text
