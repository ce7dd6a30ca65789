"""The whole of report.json, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field

from cushion_deploy.report.document.base import FreeForm, StrictModel, read_document
from cushion_deploy.report.document.build import (
    Engine,
    Environment,
    Export,
    Model,
    ParityRow,
    PlanType,
    Stage,
    Tool,
)
from cushion_deploy.report.document.measurements import Calibration, Chat, KvCache, Magnitudes, Perplexity
from cushion_deploy.report.document.prefix import Choice, Search, Tuning

REPORT_JSON = "report.json"


class Report(StrictModel):
    """The whole of report.json. A section that was not run is null; a list that was not run is empty.

    Attributes:
        unchecked: sentences about engines that run here but failed on the parity ladder before they could be compared.
    """

    schema_version: Literal[1] = Field(default=1, validation_alias="schema", serialization_alias="schema")
    tool: Tool
    created: AwareDatetime
    model: Model
    recipe: FreeForm = Field(default_factory=dict)
    precision: str
    perplexity: Perplexity | None = None
    chat: Chat | None = None
    search: Search | None = None
    tuning: Tuning | None = None
    choice: Choice | None = None
    magnitudes: Magnitudes | None = None
    calibration: Calibration | None = None
    kv_cache: KvCache | None = None
    export: Export | None = None
    parity: tuple[ParityRow, ...] = ()
    unchecked: tuple[str, ...] = ()
    engines: tuple[Engine, ...] = ()
    plan_type: PlanType | None = None
    stages: tuple[Stage, ...] = ()
    environment: Environment | None = None

    @property
    def build_seconds(self) -> float:
        """Wall time of the stages that were not reused."""
        return sum(stage.seconds for stage in self.stages if not stage.reused)

    def to_text(self) -> str:
        """Return the text of report.json: indented, keys in the order of the schema, one final newline."""
        return self.model_dump_json(indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        UntrustedArtifact: the file is missing, is not a report, or has another schema.
    """
    return read_document(path, Report, hint="run `cushion-deploy verify` on the bundle, or build it again")
