"""Base model, field types and reader shared by report.json and study.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cushion_deploy.errors import UntrustedArtifact

SCHEMA = 1

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


def _refuse_non_finite(value: JsonValue) -> JsonValue:
    """Refuse NaN and infinity inside a free-form value; pydantic accepts them there when it reads JSON text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number; write null")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _refuse_non_finite(child)
    return value


FreeForm = dict[str, Annotated[JsonValue, AfterValidator(_refuse_non_finite)]]
"""A JSON object whose keys this schema does not define, such as a recipe."""


class StrictModel(BaseModel):
    """A JSON object that refuses unknown keys, NaN and infinity; instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


def require_one_string_per_id(token_ids: Sequence[int], tokens: Sequence[str]) -> None:
    """Raise ValueError if the numbers of token ids and token strings differ."""
    if len(token_ids) != len(tokens):
        raise ValueError(f"{len(token_ids)} token ids but {len(tokens)} token strings")


DocumentT = TypeVar("DocumentT", bound=StrictModel)


def read_document(path: Path, document: type[DocumentT], *, hint: str) -> DocumentT:
    """Read a JSON file as a document.

    Args:
        path: the file.
        document: the type to validate against; its name appears in errors.
        hint: what the user should do when the file is refused.

    Raises:
        UntrustedArtifact: the file is missing, is not such a document, or has another schema.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UntrustedArtifact(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    try:
        return document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UntrustedArtifact(
            f"{path} is not a {document.__name__.lower()} of schema {SCHEMA}: {where}: {first['msg']}"
            f" (problem 1 of {error.error_count()})",
            hint=hint,
        ) from error
