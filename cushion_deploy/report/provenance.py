"""The sections that reports and studies share: the recipe, and the machine and versions it ran with."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cushion_deploy.report.document import Environment, Model
from cushion_deploy.report.render.elements import Block, Definitions, Paragraph, Preformatted, Section, Span, Text
from cushion_deploy.report.render.formatting import size


def recipe_section(recipe: Mapping[str, object]) -> Section:
    """Return every setting as JSON."""
    block: Block = json_block(recipe) if recipe else Paragraph("The recipe was not recorded.")
    return Section("recipe", "Recipe", (block,))


def environment_section(environment: Environment | None, model: Model) -> Section:
    """Return the machine, library versions and digest of the weights."""
    if environment is None:
        return Section("environment", "Environment", (Paragraph("The environment was not recorded."),))
    entries: list[tuple[str, Text]] = [("Processor", environment.cpu), ("Platform", environment.platform)]
    if environment.peak_rss_bytes is not None:
        entries.append(("Peak memory", size(environment.peak_rss_bytes)))
    entries += [("Python", environment.python), *sorted(environment.versions.items())]
    entries.append(("Weights SHA-256", (Span(model.weights_digest, "code"),)))
    return Section("environment", "Environment", (Definitions(tuple(entries)),))


def json_block(value: object) -> Preformatted:
    """Return a value as indented JSON."""
    return Preformatted(json.dumps(value, indent=2, ensure_ascii=False), "json")
