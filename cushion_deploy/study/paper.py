"""The numbers published in the paper, read from paper.json, for comparison with a study."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field, model_validator

from cushion_deploy.report.document.base import StrictModel


class PaperRow(StrictModel):
    """One row: a value per column without the prefix, and with it where published; ``name`` is this project's."""

    name: str
    without: tuple[float, ...]
    with_prefix: tuple[float, ...] = Field(default=(), validation_alias="with", serialization_alias="with")


class PaperTable(StrictModel):
    """One table of the paper: what it measures, its columns and its rows."""

    measure: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    @model_validator(mode="after")
    def _complete(self) -> PaperTable:
        for row in self.rows:
            if len(row.without) != len(self.columns) or len(row.with_prefix) not in (0, len(self.columns)):
                raise ValueError(f"row {row.name} does not have a value for each of the {len(self.columns)} columns")
        return self

    def row(self, name: str) -> PaperRow:
        """Return a row by its name; raises KeyError for an unknown one."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


@cache
def paper_source() -> str:
    """Return authors, title and venue of the paper."""
    return str(_data()["source"])


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Return the tables by name, ``table1`` to ``table6``."""
    return {name: PaperTable.model_validate(table) for name, table in _data().items() if name != "source"}


def _data() -> dict[str, Any]:
    text = files("cushion_deploy.study").joinpath("paper.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
