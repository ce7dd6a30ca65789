"""The documents: a README in every folder, links that lead somewhere, commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from cushion_deploy.cli.main import VERBS, cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cushion_deploy"
FOLDERS = sorted(p.parent.relative_to(ROOT).as_posix() for p in PACKAGE.glob("*/__init__.py"))
SKIPPED = {"node_modules", "build", "dist", "demo"}
DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*/*.md", "*/*/*.md")
    for p in ROOT.glob(pattern)
    if not any(part.startswith(".") or part in SKIPPED for part in p.relative_to(ROOT).parts)
)


def headings(path: Path) -> set[str]:
    """Return the anchors of a document, as a forge makes them of its headings."""
    titles = re.findall(r"^#+ +(.+?) *$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def commands(path: Path, prose: bool = True) -> list[list[str]]:
    """Return the commands of ``cushion-deploy`` in a document's code, lines that continue joined."""
    text = path.read_text().replace("\\\n", " ")
    code = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    if prose:
        code += "\n" + "\n".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
    found = re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S* )*((?:\S*/)?cushion-deploy\b[^\n|>&;#]*)", code, re.MULTILINE)
    return [shlex.split(line) for line in found if line.count('"') % 2 == 0 and line.count("'") % 2 == 0]


def test_there_are_documents() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(DOCUMENTS)
    assert len(FOLDERS) >= 13


@pytest.mark.parametrize("folder", ["", *FOLDERS, "bench", "examples", "examples/c", "examples/genai"])
def test_every_folder_has_a_readme(folder: str) -> None:
    readme = ROOT / folder / "README.md"
    assert readme.is_file()
    assert len(readme.read_text().split()) >= 20


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), target
        # Generated parts are on the site alone; tests/test_site.py follows links there.
        if anchor and there.suffix == ".md" and "<!-- generated" not in there.read_text():
            assert anchor in headings(there), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_option_exists(name: str) -> None:
    for words in commands(ROOT / name):
        verb = next((w for w in words[1:] if not w.startswith("-")), None)
        if verb is None or not verb[0].islower():
            continue
        assert verb in VERBS, words
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        given = [w.partition("=")[0] for w in words[1:] if w.startswith("--")]
        assert set(given) <= known, words


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith(("docs/", "README"))])
def test_every_command_in_a_code_block_parses(name: str) -> None:
    for words in commands(ROOT / name, prose=False):
        verb, *arguments = words[1:]
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None, words
        context = click.Context(command, info_name=verb)
        given, rest, _ = command.make_parser(context).parse_args(arguments)
        assert rest == [], words
        for parameter in command.params:
            values = given.get(parameter.name)
            if isinstance(values, (str, list, tuple)) and not isinstance(parameter.type, click.types.Path | click.File):
                for value in [values] if isinstance(values, str) else values:
                    parameter.type.convert(value, parameter, context)
            if parameter.required:
                assert values, (words, parameter.name)


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", text)] == []


def test_every_extra_of_the_documents_exists() -> None:
    # By hand: Python 3.10 has no reader of TOML.
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    texts = [p.read_text() for p in (*map(ROOT.joinpath, DOCUMENTS), *PACKAGE.glob("*/*.py"))]
    named = {e for t in texts for group in re.findall(r"cushion-deploy\[([\w,]+)\]", t) for e in group.split(",")}
    assert "cpu" in named
    assert named <= extras
