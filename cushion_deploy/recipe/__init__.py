"""The recipe: every setting of a build as a checked, frozen value, from YAML, from flags, and back to YAML."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graphs import PrefixMode
from cushion_deploy.core.kv_scales import KvGranularity
from cushion_deploy.core.scales import Estimator
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.errors import UsageError, unknown_choice

_LIMIT = 1 << 20
_PRINT_CONFIG = "`cushion-deploy build --print-config` prints every setting with its meaning"

Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A list of strings; not strict only in that a YAML list serves for the tuple."""


class Section(BaseModel):
    """A group of settings. To add one, add a field with a description: load, merge, print and help follow."""

    # Strict, because pydantic would otherwise read the YAML `yes` as the number 1 and "4" as 4.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Search(Section):
    """How the prefix is found."""

    enabled: bool = Field(default=True, description="Search a prefix; false builds without one.")
    seed_tokens: Names = Field(default=(), description="Token texts that the prefix begins with.")
    max_length: int = Field(default=4, ge=0, description="Most tokens that the prefix may have.")
    tau: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Append a token only if it leaves at most this share of the quantization error.",
    )
    text_tokens: int = Field(default=512, ge=16, description="Tokens of text that each step scores candidates on.")
    objective: Literal["error", "max"] = Field(
        default="error", description="What to minimize: squared quantization error, or the largest activation."
    )
    mode: Literal["screen", "exhaustive"] = Field(
        default="screen", description="Score screened candidates exactly, or every token of the vocabulary."
    )
    random_candidates: int = Field(
        default=128, ge=0, description="Random tokens among the candidates of a screened search."
    )
    screen_candidates: int = Field(
        default=64, ge=0, description="Candidates of a screened search with the largest self-sink activation."
    )
    gradient_candidates: int = Field(
        default=64, ge=0, description="Candidates of a screened search that the gradient favours; 0 takes no gradient."
    )
    audit_tokens: int = Field(
        default=16, ge=0, description="Fresh random tokens that each found token is ranked against, exactly scored."
    )
    batch_positions: int = Field(default=2048, ge=1, description="Token positions in one forward pass; bounds memory.")


class SmoothQuant(Section):
    """How much of the size of activation channels is folded into the weights."""

    alpha: float | None = Field(
        default=0.5, ge=0, le=1, description="Share of it that moves into the weights (SmoothQuant); null for none."
    )
    limit: float | None = Field(
        default=1.5,
        gt=0,
        description="Channels that are still larger than this many times the 90th percentile are divided down to it; "
        "null for none.",
    )


class Tuning(Section):
    """How the prefix is tuned (Eq. 11 of the paper)."""

    enabled: bool = Field(default=False, description="Train keys and values of the prefix, the model frozen.")
    loss: Literal["distill", "ce"] = Field(
        default="distill",
        description="Stay close to the original model (distill), or predict the text as the paper does (ce).",
    )
    error_weight: float = Field(default=0.01, ge=0, description="Weight (lambda) of the quantization error.")
    scales: bool = Field(default=True, description="Train the static activation scales along with the prefix.")
    learning_rate: float = Field(default=0.001, gt=0, description="Adam learning rate of keys and values.")
    scale_learning_rate: float = Field(
        default=0.003, gt=0, description="Adam learning rate of the logarithms of the scales."
    )
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="Course of the learning rates.")
    epochs: int = Field(default=2, ge=1, description="Times that each window is used.")
    windows: int = Field(default=80, ge=1, description="Windows of text to train on.")
    held_out: int = Field(default=8, ge=1, description="Other windows of text that decide which state is kept.")
    window: int = Field(default=256, ge=2, description="Tokens in one window.")
    batch: int = Field(default=2, ge=1, description="Windows in one optimizer step.")
    microbatch: int = Field(default=1, ge=1, description="Windows in one forward and backward pass; bounds memory.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of a gradient.")
    judge_every: int = Field(default=20, ge=1, description="Steps between two looks at the held-out text.")
    checkpointing: bool = Field(
        default=True, description="Run layers again for the gradient instead of keeping their activations."
    )


class Calibration(Section):
    """How static activation scales are measured."""

    data: str | None = Field(
        default=None, description="Text file or data set to calibrate on; null is the offline default."
    )
    estimator: Estimator = Field(default="percentile", description="Range estimator: max, percentile or mse.")
    percentile: float = Field(
        default=99.9995, gt=50, le=100, description="Percentile that the percentile estimator keeps."
    )
    windows: int = Field(default=32, ge=1, description="Windows of text to observe.")
    window: int = Field(default=512, ge=2, description="Tokens in one window.")


class Export(Section):
    """What the ONNX graph looks like."""

    quantize_head: bool = Field(default=False, description="Run the output head in INT8 too.")
    keep_float: Names = Field(
        default=(),
        description="Sites to keep in floating point, by name, or auto:N for the N that cost the most.",
    )
    opset: int | None = Field(default=None, ge=13, description="ONNX opset; null is the lowest that serves.")
    prefix: PrefixMode = Field(
        default="baked",
        description="Put the prefix into the graph (baked), beside it for the first slots of every cache (cache), "
        "or leave it out (none).",
    )
    kv_cache: Literal["float", "int8"] = Field(
        default="float", description="Keep keys and values of the cache in floating point, or as INT8 codes."
    )
    kv_scales: KvGranularity = Field(
        default="per-head", description="Scales of an INT8 cache: one for each head, or one per-tensor in each layer."
    )


class Evaluation(Section):
    """What perplexity is measured on."""

    data: str | None = Field(
        default=None, description="Text file or data set, not the calibration's; null is the default."
    )
    window: int = Field(default=512, ge=2, description="Tokens in one window.")
    max_tokens: int = Field(default=4096, ge=2, description="Most tokens to score.")

    @model_validator(mode="after")
    def _one_window(self) -> Evaluation:
        if self.max_tokens < self.window:
            raise ValueError(f"max_tokens {self.max_tokens} is less than one window of {self.window} tokens")
        return self


class Parity(Section):
    """How the parity ladder compares the rungs."""

    data: str | None = Field(default=None, description="Text file or data set; null is the default.")
    tokens: int = Field(default=256, ge=2, description="Tokens of text to compare logits and codes on.")
    decode_tokens: int = Field(default=16, ge=1, description="Tokens to decode one by one against prefill.")


class TensorRt(Section):
    """The floating-point type of TensorRT plans, and what their optimization profiles admit."""

    dtype: Dtype = Field(
        default="float16",
        description="Type of what stays in floating point in plans: float16, bfloat16 (residual streams beyond "
        "half's range) or float32 (no fused attention).",
    )

    max_batch: int = Field(default=1, ge=1, description="Largest batch of TensorRT profiles.")
    max_context: int = Field(default=2048, ge=1, description="Longest context of TensorRT profiles, prefix left out.")
    max_prefill: int = Field(default=512, ge=1, description="Longest piece of a prompt in one call of a plan.")


@dataclass(frozen=True)
class Setting:
    """One setting of the recipe: dotted name, meaning, default."""

    name: str
    description: str
    default: Any


class Recipe(Section):
    """Every setting of a build."""

    model: str | None = Field(default=None, description="GGUF file, folder or hub id of the model.")
    revision: str | None = Field(default=None, description="Revision of a hub model; null is its main branch.")
    precision: str = Field(default="w8a8", description=f"Deployable precision: {', '.join(PRECISIONS)}.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    engines: Names | None = Field(default=None, description="Engines to compile; null is every one available here.")
    search: Search = Field(default_factory=Search, description="How the prefix is found.")
    smoothing: SmoothQuant = Field(
        default_factory=SmoothQuant, description="How much of the size of activation channels is folded into weights."
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How static activation scales are measured."
    )
    tuning: Tuning = Field(default_factory=Tuning, description="How the prefix is tuned.")
    export: Export = Field(default_factory=Export, description="What the ONNX graph looks like.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What perplexity is measured on.")
    parity: Parity = Field(default_factory=Parity, description="How the parity ladder compares the rungs.")
    tensorrt: TensorRt = Field(
        default_factory=TensorRt, description="Type and optimization profiles of TensorRT plans."
    )

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise unknown_choice("precision", value, sorted(PRECISIONS))
        return value

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from YAML; what it leaves out has its default.

        Raises:
            UsageError: no such file, not YAML, an unknown or repeated key, a wrong type, a value out of range.
        """
        try:
            with open(path, "rb") as f:
                raw = f.read(_LIMIT + 1)
        except OSError as e:
            raise UsageError(
                f"cannot read the recipe {path}: {e.strerror}", hint="give the path of a YAML file; " + _PRINT_CONFIG
            ) from e
        if len(raw) > _LIMIT:
            raise UsageError(f"the recipe {path} is larger than 1 MiB", hint="this is no recipe; " + _PRINT_CONFIG)
        try:
            _refuse_repeated_keys(yaml.compose(raw, Loader=yaml.SafeLoader))
            data = yaml.safe_load(raw)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise UsageError(f"the recipe {path} is not valid YAML: {_yaml_reason(e)}", hint=_PRINT_CONFIG) from e
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise UsageError(
                f"the recipe {path} holds a {type(data).__name__}, expected a table of settings", hint=_PRINT_CONFIG
            )
        # A heading whose settings are all commented out reads as null; it means the section's defaults.
        sections = {k for k, f in cls.model_fields.items() if _section(f.annotation)}
        return _validate({k: v for k, v in data.items() if v is not None or k not in sections}, f"{path}: ")

    @classmethod
    def from_bundle(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a bundle's manifest carries.

        Raises:
            UsageError: another version of the program wrote it, with settings that this one does not know.
        """
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
            UsageError: an unknown name, a wrong type, a value out of range, null where none is allowed.
        """
        data = self.model_dump()
        names = {s.name for s in self.settings()}
        for name, value in overrides.items():
            if name not in names:
                raise _unknown(name)
            section, _, inner = name.rpartition(".")
            (data[section] if section else data)[inner] = value
        return _validate(data, "")

    def to_yaml(self) -> str:
        """Return the recipe as YAML with each setting's meaning as a comment; loading it gives an equal recipe."""
        return "\n".join(_dump(self))


_EXPECTED = {"model_type": "a table of settings", "tuple_type": "a list of texts", "invalid_key": "text as key"}
"""What pydantic expects, by error type, where its own words speak of Python."""


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _dump(section: Section) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield f"# {field.description}"
        if isinstance(value, Section):
            yield f"{name}:"
            yield textwrap.indent("\n".join(_dump(value)), "  ")
        else:
            # One line a value, as far as YAML allows: folded text is hard to read below a comment.
            if isinstance(value, tuple):
                yield f"{name}: {yaml.safe_dump(list(value), default_flow_style=True, width=1 << 20)}".rstrip("\n")
            else:
                yield yaml.safe_dump({name: value}, default_flow_style=False, width=1 << 20).rstrip("\n")


def _refuse_repeated_keys(node: Any) -> None:
    """Raise ValueError if a mapping has a key twice, where YAML would silently keep the last."""
    seen_nodes: set[int] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise ValueError(f"'{key.value}' stands a second time in line {key.start_mark.line + 1}")
                keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
                pending.append(value)


def _yaml_reason(e: Exception) -> str:
    if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark is not None:
        return f"{e.problem} in line {e.problem_mark.line + 1}"
    if isinstance(e, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(e).split())


def _validate(data: Mapping[Any, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise _usage(e, where) from None


def _usage(e: ValidationError, where: str) -> UsageError:
    """Return the first problem of a ValidationError as a line of what was found and one of what to do."""
    problems = e.errors(include_url=False)
    first = problems[0]
    name = ".".join(str(part) for part in first["loc"])
    more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        error = _unknown(name)
        return UsageError(where + error.message + more, hint=error.hint)
    if first["type"] == "value_error":
        return UsageError(f"{where}{name}: {first['ctx']['error']}{more}", hint=_PRINT_CONFIG)
    expected = first["msg"].removeprefix("Input should be ")
    found = "null" if first["input"] is None else repr(first["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    expected = _EXPECTED.get(first["type"], expected)
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    hint = f"expected {expected}; {_PRINT_CONFIG}"
    if first["type"] == "float_type" and isinstance(first["input"], str):
        hint = f"expected {expected}; YAML reads 1e-1 as text, write 0.1 or 1.0e-1"
    return UsageError(f"{where}{name} is {found}{more}", hint=hint)


def _unknown(name: str) -> UsageError:
    """Return the error for a key that does not exist, with the nearest one that does."""
    names = [s.name for s in Recipe.settings()]
    sections = list(dict.fromkeys(n.partition(".")[0] for n in names if "." in n))
    if name in sections:
        inside = ", ".join(n for n in names if n.startswith(name + "."))
        return UsageError(f"'{name}' is a section, not a setting", hint=f"choose one of: {inside}")
    section, _, last = name.rpartition(".")
    siblings = [n for n in names if n.rpartition(".")[0] == section] + ([] if section else sections)
    near = (
        difflib.get_close_matches(name, siblings, n=1)
        or [n for n in names if n.rpartition(".")[2] == last]
        or difflib.get_close_matches(name, names, n=1)
    )
    if near:
        return UsageError(f"unknown setting '{name}'", hint=f"did you mean '{near[0]}'? {_PRINT_CONFIG}")
    return UsageError(f"unknown setting '{name}'", hint=f"choose one of: {', '.join(siblings or names)}")
