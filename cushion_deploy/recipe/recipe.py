"""The recipe: every setting of a build as one validated, frozen value; loaded, merged with overrides, and dumped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from cushion_deploy.core.schemes import PRECISIONS, QuantScheme
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.recipe.sections import (
    ROTATIONS,
    Calibration,
    Compute,
    Evaluation,
    Export,
    Names,
    Parity,
    Search,
    Section,
    SmoothQuant,
    TensorRt,
    Tuning,
)
from cushion_deploy.recipe.text import dump_yaml, parse_yaml
from cushion_deploy.recipe.validation import PRINT_CONFIG, unknown_setting, usage_error
from cushion_deploy.store.text_files import decode_utf8

_LIMIT = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One setting of the recipe: dotted name, description, default."""

    name: str
    description: str
    default: Any


class Recipe(Section):
    """Every setting of a build."""

    model: str | None = Field(default=None, description="GGUF file, folder or hub id of the model.")
    revision: str | None = Field(default=None, description="Revision of a hub model; null is its main branch.")
    precision: str = Field(default="w8a8", description=f"Deployable precision: {', '.join(PRECISIONS)}.")
    seed: int = Field(default=0, ge=0, description="Seed of all random numbers.")
    engines: Names | None = Field(
        default=None, description="Engines to compile for; null is every engine that can compile on this machine."
    )
    compute: Compute = Field(default_factory=Compute, description="Where and how torch computes.")
    search: Search = Field(default_factory=Search, description="How the prefix is found.")
    smoothing: SmoothQuant = Field(
        default_factory=SmoothQuant,
        description="How inputs of linears are made easier to quantize: SmoothQuant and rotations.",
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How static activation scales are measured."
    )
    tuning: Tuning = Field(default_factory=Tuning, description="How the prefix is tuned.")
    export: Export = Field(default_factory=Export, description="What the ONNX graph looks like.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What perplexity is measured on.")
    parity: Parity = Field(default_factory=Parity, description="How much text the parity ladder compares its rungs on.")
    tensorrt: TensorRt = Field(
        default_factory=TensorRt, description="Floating-point type and optimization profiles of TensorRT plans."
    )

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise unknown_choice("precision", value, sorted(PRECISIONS))
        return value

    @property
    def scheme(self) -> QuantScheme:
        """The scheme before ``export.keep_float`` and an embedding on ``auto`` are decided: every Site is quantized."""
        export = self.export
        return replace(
            PRECISIONS[self.precision],
            quantize_head=export.quantize_head,
            int8_embedding=export.embedding == "int8",
        )

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from a YAML file; settings that it omits take their defaults.

        Raises:
            UsageError: the file is missing, larger than 1 MiB, not UTF-8 or not YAML; a key is unknown or repeated; a
                value has the wrong type or is out of range.
        """
        try:
            with open(path, "rb") as f:
                raw = f.read(_LIMIT + 1)
        except OSError as e:
            raise UsageError(
                f"cannot read the recipe {path}: {e.strerror}", hint="give the path of a YAML file; " + PRINT_CONFIG
            ) from e
        if len(raw) > _LIMIT:
            raise UsageError(f"the recipe {path} is larger than 1 MiB", hint="give a YAML file; " + PRINT_CONFIG)
        try:
            data = parse_yaml(decode_utf8(raw, f"the recipe {path}"))
        except ValueError as e:
            raise UsageError(f"the recipe {path} is not valid YAML: {e}", hint=PRINT_CONFIG) from e
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise UsageError(
                f"the recipe {path} contains a {type(data).__name__}, expected a mapping of settings", hint=PRINT_CONFIG
            )
        # A section whose settings are all commented out reads as null; it takes the defaults.
        sections = {k for k, f in cls.model_fields.items() if _section(f.annotation)}
        return _validate({k: v for k, v in data.items() if v is not None or k not in sections}, f"{path}: ")

    @classmethod
    def from_bundle(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe in a bundle's manifest.

        Raises:
            UsageError: the recipe has settings that this version does not have; another version wrote it.
        """
        smoothing = data.get("smoothing")
        if isinstance(smoothing, Mapping):
            # Bundles of versions without rotations have none.
            data = {**data, "smoothing": {**dict.fromkeys(ROTATIONS, 0), **smoothing}}
        return _validate(data, "the recipe in the bundle: ")

    @classmethod
    def settings(cls) -> Iterator[Setting]:
        """Yield every setting in order, for documentation and ``--help``."""
        for name, field in cls.model_fields.items():
            if section := _section(field.annotation):
                for inner, f in section.model_fields.items():
                    yield Setting(f"{name}.{inner}", f.description or "", f.get_default(call_default_factory=True))
            else:
                yield Setting(name, field.description or "", field.get_default(call_default_factory=True))

    def merged(self, overrides: Mapping[str, object]) -> Recipe:
        """Return this recipe with some settings replaced.

        Args:
            overrides: dotted name, such as ``search.max_length``, to value; None sets it to null.

        Raises:
            UsageError: a name is unknown; a value has the wrong type, is out of range, or is null where null is not
                allowed.
        """
        data = self.model_dump()
        names = _names()
        for name, value in overrides.items():
            if name not in names:
                raise unknown_setting(name, names)
            section, _, inner = name.rpartition(".")
            (data[section] if section else data)[inner] = value
        return _validate(data, "")

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each setting below its description; loading it gives an equal recipe."""
        return dump_yaml(self)


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _names() -> list[str]:
    return [s.name for s in Recipe.settings()]


def _validate(data: Mapping[Any, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise usage_error(e, where, _names()) from None
