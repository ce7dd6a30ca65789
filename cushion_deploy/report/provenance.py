"""The sections that reports and studies share: the recipe, and the machine and versions it ran with."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cushion_deploy.report.document.build import Environment, Model
from cushion_deploy.report.render.elements import Paragraph, Preformatted, Section, Span, Table, Text
from cushion_deploy.report.render.formatting import size


def recipe_section(recipe: Mapping[str, object]) -> Section:
    """Return every setting as JSON."""
    return Section("recipe", "Recipe", (json_block(recipe) if recipe else Paragraph("No recipe was recorded."),))


def environment_section(environment: Environment | None, model: Model) -> Section:
    """Return the machine, library versions and digest of the weights."""
    rows: list[tuple[str, Text]] = [("Weights SHA-256", (Span(model.weights_digest, "code"),))]
    if environment is None:
        note = (Paragraph("The environment was not recorded."),)
        return Section("environment", "Environment", (*note, names_and_values(rows)))
    rows += [("Processor", environment.cpu), ("Platform", environment.platform)]
    if environment.peak_rss_bytes is not None:
        rows.append(("Peak memory", size(environment.peak_rss_bytes)))
    if environment.peak_device_bytes is not None:
        rows.append(("Peak memory of the GPU", size(environment.peak_device_bytes)))
    rows += [("Python", environment.python), *sorted(environment.versions.items())]
    return Section("environment", "Environment", (names_and_values(rows),))


def names_and_values(rows: list[tuple[str, Text]]) -> Table:
    """Return a table of names and values without headings."""
    return Table(("", ""), tuple(rows), align="ll")


def json_block(value: object) -> Preformatted:
    """Return a value as indented JSON."""
    return Preformatted(json.dumps(value, indent=2, ensure_ascii=False), "json")
