"""The documentation as a site: it builds without a warning, asks nothing from elsewhere, and its parts are complete."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from cushion_deploy.cli.main import VERBS
from cushion_deploy.errors import ExitCode
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import Report

ROOT = Path(__file__).parents[1]
README_LINES = 150


class Page(HTMLParser):
    """What a page loads, links to, and can be linked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors.add(given.get("id", ""))
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, built as `make docs` builds it."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'cushion-deploy[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


def test_every_page_of_the_folder_is_in_the_navigation(pages: dict[Path, Page], site: Path) -> None:
    (home,) = (page for file, page in pages.items() if file == site / "index.html")
    reached, waiting = {site / "index.html"}, [site / "index.html"]
    while waiting:
        here = waiting.pop()
        for link in pages[here].links:
            there = (here.parent / link.partition("#")[0]).resolve()
            if there in pages and there not in reached:
                reached.add(there)
                waiting.append(there)
    written = {
        file.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for file in (ROOT / "docs").rglob("*.md")
    }
    assert len(written) >= 30
    assert {site / name for name in written} <= reached
    assert home.loaded


def test_no_page_loads_anything_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    for file, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"[a-z]+:|//", address), (file, address)
            assert (file.parent / address.partition("?")[0]).is_file(), (file, address)
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"@import|url\(['\"]?(?:https?:)?//", sheet.read_text()), sheet


def test_every_link_within_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    checked = 0
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            there = (file.parent / path).resolve() if path else file
            assert there.exists(), (file, link)
            if anchor and there in pages:
                checked += 1
                assert anchor in pages[there].anchors, (file, link)
    assert checked > 100


def text(site: Path, name: str) -> str:
    return re.sub(r"<[^>]+>", "", (site / name).read_text())


def test_the_reference_of_the_command_line_is_complete(site: Path, pages: dict[Path, Page]) -> None:
    from click import Context

    from cushion_deploy.cli.main import cli

    page = text(site, "reference/command-line.html")
    assert set(VERBS) <= pages[site / "reference/command-line.html"].anchors
    for verb in VERBS:
        command = cli.get_command(Context(cli), verb)
        assert command is not None
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert [option for option in options if option not in page] == [], verb


def test_the_reference_of_the_recipe_is_complete(site: Path) -> None:
    page = text(site, "reference/recipe.html")
    settings = list(Recipe.settings())
    assert len(settings) > 50
    assert [setting.name for setting in settings if setting.name not in page] == []


def test_the_reference_of_python_shows_signatures_and_no_markup(site: Path) -> None:
    page = text(site, "reference/python.html")
    for name in ("stream_chat", "SamplingParams", "open_bundle", "UntrustedArtifact"):
        assert name in page
    assert re.findall(r":(?:class|data|func|attr|meth|mod):", page) == []


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs/reference/exit-codes.md").read_text(), re.MULTILINE)
    assert sorted(map(int, rows)) == sorted(ExitCode)


def test_files_that_a_page_shows_are_in_it(site: Path) -> None:
    assert "actions/checkout" in text(site, "how-to/parity-in-ci.html")
    assert "stream_chat" in text(site, "how-to/python.html")
    assert "&lt;!-- file" not in text(site, "how-to/python.html")


def test_the_readme_is_short_and_is_the_home_page(site: Path) -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    home = text(site, "index.html")
    assert "What runs where" in home
    assert (site / "figures/activations.svg").is_file()


def test_the_figure_is_small_and_asks_nothing() -> None:
    figure = ROOT / "docs/figures/activations.svg"
    content = figure.read_text()
    assert figure.stat().st_size < 60_000
    assert "prefers-color-scheme:dark" in content
    assert set(re.findall(r'href="([^"]*)"', content)) <= set(re.findall(r'href="(#[^"]*)"', content))


def test_the_published_schema_is_that_of_the_reader(site: Path) -> None:
    schema = json.loads((site / "reference/report.schema.json").read_text())
    assert schema.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert schema == Report.model_json_schema(mode="serialization")
