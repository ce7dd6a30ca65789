"""The model that was built, the program and machine that built it, and the time each stage took."""

from __future__ import annotations

from pydantic import Field

from cushion_deploy.report.document.base import Count, Seconds, StrictModel


class Tool(StrictModel):
    """The program that wrote the document."""

    version: str


class Model(StrictModel):
    """The model that was built; ``parameters`` counts scalars."""

    family: str
    parameters: Count
    source: str
    layers: Count
    hidden_size: Count
    heads: Count
    kv_heads: Count
    vocab_size: Count
    weights_digest: str


class Stage(StrictModel):
    """Wall time of one stage of the build; ``reused`` if the result of an earlier build was used."""

    stage: str
    seconds: Seconds
    reused: bool


class Environment(StrictModel):
    """The machine and the library versions of the build."""

    python: str
    platform: str
    cpu: str
    versions: dict[str, str] = Field(default_factory=dict)
    peak_rss_bytes: Count | None = None
