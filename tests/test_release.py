"""What a release and a bug report rely on: supported Pythons, the change log, the workflow, the issue templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest

from cushion_deploy.cli.main import VERBS, cli
from cushion_deploy.recipe.text import parse_yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
GITHUB = ROOT / ".github"


def read(file: Path) -> Any:
    return parse_yaml(file.read_text())


def test_the_workflow_installs_on_every_python_of_the_classifiers() -> None:
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    edge = read(GITHUB / "workflows" / "ci.yml")["jobs"]["edge"]
    assert edge["strategy"]["matrix"]["python"] == classified
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert oldest is not None
    assert classified[0] == oldest[1]


def test_nothing_is_published_that_was_not_tested() -> None:
    jobs = read(GITHUB / "workflows" / "ci.yml")["jobs"]
    assert set(jobs["publish"]["needs"]) >= {"test", "edge"}
    assert jobs["edge"]["needs"] == "wheel"
    assert "tags/v" in jobs["publish"]["if"]
    # Nobody but the job that publishes may do more than read.
    assert read(GITHUB / "workflows" / "ci.yml")["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]


def test_the_change_log_begins_with_what_is_not_released_or_with_this_version() -> None:
    version = re.search(r'^version = "(.+)"', PROJECT, re.MULTILINE)
    assert version is not None
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", version[1])
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("name", ["bug", "model-or-device"])
def test_a_report_has_to_say_what_is_installed(name: str) -> None:
    template = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    asked = {
        field["attributes"]["label"].partition("`")[2].rstrip("`"): field["validations"]["required"]
        for field in template["body"]
        if "`cushion-deploy" in field["attributes"]["label"]
    }
    assert asked == {"cushion-deploy --version": True, "cushion-deploy doctor --json": True}
    doctor = cli.get_command(click.Context(cli), "doctor")
    assert "doctor" in VERBS
    assert doctor is not None
    assert "--json" in {option for parameter in doctor.params for option in parameter.opts}
