"""What mkdocs builds beyond docs/: the README as home page, and every file of the repository that a page links to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import recipe
import report_schema
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
HOME = "README.md"
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<path>[^)\s#:]+)(?P<after>(?:#[^)\s]*)?\))")
SHOWN = re.compile(r"<!-- file: (\S+) -->")
ROLE = re.compile(r":(?:class|data|func|attr|meth|mod):(<code>)~?(?:[\w.]+\.)?(?=\w+</code>)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
GENERATED = {
    "<!-- generated: command line -->": command_line.page,
    "<!-- generated: recipe -->": recipe.page,
    "<!-- generated: report.json -->": report_schema.page,
}


def outside_code(text: str, edit: Any) -> str:
    """Return a text with ``edit`` applied to everything but its fenced code."""
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [edit(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, edit(text[end:])])


def target(source: str, path: str) -> str:
    """Return the file of the repository that a link in the file ``source`` leads to."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    return f"{found}/README.md" if (ROOT / found).is_dir() else found


def address(name: str) -> str:
    """Return the place of a file of the repository in the site."""
    if name == HOME:
        return "index.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def linked(name: str) -> Iterator[str]:
    """Yield the files that a Markdown file links to."""
    for match in LINK.finditer(FENCE.sub("", (ROOT / name).read_text())):
        yield target(name, match["path"])


def shown(match: re.Match[str]) -> str:
    """Return the code block of a file that a page shows."""
    path = ROOT / match[1]
    return f"```{path.suffix.removeprefix('.')}\n{path.read_text()}```"


def on_files(files: Files, config: Any) -> Files:
    """Add the README, what is linked from any page, and the schema of report.json."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen, waiting = set(pages), [HOME, *pages]
    while waiting:
        name = waiting.pop()
        new = [name, *(linked(name) if name.endswith(".md") else ())]
        for other in new:
            if other not in seen and not other.startswith("docs/") and (ROOT / other).is_file():
                seen.add(other)
                waiting.append(other)
                files.append(File.generated(config, address(other), content=(ROOT / other).read_bytes()))
    files.append(File.generated(config, "reference/report.schema.json", content=report_schema.text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Insert the generated parts of a page, and turn links between files into links between pages."""
    here = page.file.src_uri
    source = HOME if here == "index.md" else here.removeprefix("repository/")
    source = source if source == HOME or here.startswith("repository/") else f"docs/{here}"

    def relative(match: re.Match[str]) -> str:
        there = address(target(source, match["path"]))
        return match["before"] + posixpath.relpath(there, posixpath.dirname(here) or ".") + match["after"]

    if here == "index.md":
        page.meta["hide"] = ["navigation"]
    markdown = outside_code(markdown, lambda text: LINK.sub(relative, text))
    markdown = SHOWN.sub(shown, markdown)
    for marker, make in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show what a docstring names by a role of Sphinx as code, by its last name."""
    return ROLE.sub(r"\1", html)
