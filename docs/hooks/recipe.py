"""The reference of the recipe, from its pydantic models."""

from __future__ import annotations

import json
from typing import Any

from command_line import cell

from cushion_deploy.recipe import Recipe


def kind(schema: dict[str, Any]) -> str:
    """Return type and range of a setting in words."""
    if "anyOf" in schema:
        return " or ".join(kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    name = {"array": "list", "string": "text"}.get(schema.get("type", ""), schema.get("type", "value"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([name, ", ".join(limits)]).strip()


def rows(fields: dict[str, Any], before: str) -> list[str]:
    """Return the rows of a table of settings."""
    return [
        f"| `{before}{name}` | {kind(field)} | `{json.dumps(field.get('default'))}` | {cell(field['description'])} |"
        for name, field in fields.items()
    ]


def page() -> str:
    """Return a table of the settings of every section."""
    schema = Recipe.model_json_schema()
    whole, sections = {}, []
    header = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        if "$ref" not in field:
            whole[name] = field
            continue
        fields = schema["$defs"][field["$ref"].rpartition("/")[2]]["properties"]
        sections += [
            f"## {name}",
            "",
            Recipe.model_fields[name].description or "",
            "",
            *header,
            *rows(fields, f"{name}."),
            "",
        ]
    return "\n".join(["## Whole build", "", *header, *rows(whole, ""), "", *sections])
