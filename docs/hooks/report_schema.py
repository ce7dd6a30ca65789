"""The reference of report.json: its JSON Schema, and a table of every object in it."""

from __future__ import annotations

import json
import re
from inspect import cleandoc
from typing import Any

from command_line import cell

from cushion_deploy.report.document import Report


def text() -> str:
    """Return the JSON Schema (draft 2020-12) of report.json."""
    schema = Report.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def kind(schema: dict[str, Any]) -> str:
    """Return the type of a field in words, with links to the objects of this page."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if schema.get("type") == "array":
        inner = schema.get("items") or {}
        if "prefixItems" in schema:
            return "list of " + ", ".join(kind(item) for item in schema["prefixItems"])
        return f"list of {kind(inner)}"
    return {"string": "text"}.get(schema.get("type", ""), schema.get("type", "any value"))


def section(name: str, schema: dict[str, Any]) -> str:
    """Return one object: its docstring, and a table of its fields."""
    summary, _, attributes = cleandoc(schema.get("description", "")).partition("Attributes:")
    meanings = dict(re.findall(r"^ +(\w+): (.*(?:\n {8,}.*)*)", attributes, re.MULTILINE))
    lines = [f"## {name}", "", cell(summary), ""]
    if schema.get("properties"):
        lines += ["| field | type | |", "| --- | --- | --- |"]
        for field, value in schema["properties"].items():
            lines.append(f"| `{field}` | {kind(value)} | {cell(meanings.get(field, value.get('description', '')))} |")
    elif "enum" in schema:
        lines.append(kind(schema))
    return "\n".join(lines)


def page() -> str:
    """Return a link to the schema, and the sections of the report and of every object in it."""
    schema = Report.model_json_schema(mode="serialization")
    sections = [section("Report", schema), *(section(n, s) for n, s in sorted(schema.get("$defs", {}).items()))]
    return "\n\n".join(["The schema: [report.schema.json](report.schema.json)", *sections])
