"""Base classes of the pipeline: nodes, and stages whose artifacts are kept in the work folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from cushion_deploy.core.model_spec import ModelSpec
    from cushion_deploy.stages.run import Inputs

T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Measured cost of the parts of a build on this machine, in seconds per token position unless stated otherwise.

    Attributes:
        spec: the model that was measured.
        layers: all layers, without the head.
        compared: all layers and the comparison of the logits with those of the original model.
        quantized: the same through the fake-quantized model.
        swap: quantizing all weights and restoring them (seconds).
        observed: all layers with the input of every Site observed.
        scored: all layers with the objective of the search.
        screened: all layers for a token that is alone in its row.
        depth: share of the layers that the search screens.
        decode_step: one step of the sampler for all of its rows (seconds).
        search_steps: number of steps that a search probably runs.
        weights: bytes of the weights that stay on the device.
        on_cpu: whether that is the CPU's memory.
    """

    spec: ModelSpec
    layers: float
    compared: float
    quantized: float
    swap: float
    observed: float
    scored: float
    screened: float
    depth: float
    decode_step: float
    search_steps: int
    weights: int
    on_cpu: bool


@dataclass(frozen=True)
class Node(ABC, Generic[T]):
    """A node of the pipeline: it produces one artifact of type ``T``.

    A node is a frozen dataclass. Its fields determine the artifact completely: fields that are nodes are its inputs,
    the others are its settings. The final nodes of a build therefore hold the whole dependency graph. A field with
    ``compare=False`` does not affect the artifact: a title, or a node that is used only to save work.
    """

    @property
    def label(self) -> str:
        """The name that is shown to users."""
        return type(self).__name__

    @property
    def inputs(self) -> dict[str, Node[Any]]:
        """The fields that are nodes, by name; the elements of a tuple as ``name[i]``."""
        return dict(_nodes(self._fields(deciding=True)))

    @property
    def helpers(self) -> dict[str, Node[Any]]:
        """The nodes among the fields that do not affect the artifact, by name."""
        return dict(_nodes(self._fields(deciding=False)))

    @property
    def settings(self) -> dict[str, Any]:
        """The other fields, JSON-ready; a value that has a digest is represented by it."""
        found = {name: value for name, value in self._fields(deciding=True) if not isinstance(value, Node)}
        return {name: _plain(value) for name, value in found.items() if not _holds_nodes(value)}

    def _fields(self, *, deciding: bool) -> Iterator[tuple[str, Any]]:
        for field in fields(self):
            if field.compare is deciding:
                yield field.name, getattr(self, field.name)

    def ran_on(self, artifact: T) -> str:
        """Return on what the artifact runs what depends on it, such as ``cpu, float32``; empty if it runs nothing."""
        return ""

    @property
    def known_digest(self) -> str | None:
        """The digest of the artifact if it is known without making the artifact; None otherwise."""
        return None

    def digest_of(self, artifact: T) -> str:
        """Return the SHA-256 (hex) that identifies the artifact in the keys of downstream stages."""
        found: str = artifact.digest  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Derived(Node[T]):
    """A node whose artifact is made anew in every process: loaded, assembled, or given."""

    timed: ClassVar[bool] = False
    """Whether the time it takes is a row of the report."""
    exclusive: ClassVar[bool] = False
    """Whether making it drops other artifacts of the same class first, because memory holds only one."""

    @abstractmethod
    def make(self, inputs: Inputs) -> T:
        """Return the artifact."""


@dataclass(frozen=True)
class Stage(Node[T]):
    """A node whose artifact is kept in the work folder and reused if version, settings and inputs are unchanged.

    ``version`` must be raised whenever a code change may change the artifact, because the code itself is not part of
    the key. ``tests/stages/test_fingerprints.py`` fails on every change of that code until this has been decided.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    shared: ClassVar[bool] = False
    """Whether several processes share its work; a stage that is not shared runs in the first of them."""
    runs_model: ClassVar[bool] = True
    """Whether it runs a model that is among its inputs."""

    @property
    def label(self) -> str:
        """The name; a stage that occurs more than once in a pipeline appends what distinguishes it."""
        return self.name

    def label_of(self, inputs: Inputs) -> str:
        """Return the label of a finished stage, whose inputs are known."""
        return self.label

    @abstractmethod
    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the artifact into the empty folder ``out``."""

    @abstractmethod
    def read(self, folder: Path) -> T:
        """Return the artifact that :meth:`run` wrote, in this process or an earlier one."""

    def shortcut(self, inputs: Inputs) -> T | None:
        """Return the artifact if no work is needed for it; None if the stage has to run."""
        return None

    def room(self, inputs: Inputs) -> int:
        """Return the approximate size of the artifact in bytes; 0 if it is small. Called only before the stage runs."""
        return 0

    def disk(self, spec: ModelSpec) -> int:
        """Return the approximate size of the artifact in bytes, given the size of the model; 0 if it is small."""
        return 0

    def seconds(self, speed: Speed) -> float:
        """Return the approximate duration of the stage in seconds; 0 if it is short."""
        return 0.0


@dataclass(frozen=True)
class Given(Derived[T]):
    """An artifact that was supplied by the caller, such as a prefix from a file; identified by its digest."""

    artifact: T

    def make(self, inputs: Inputs) -> T:
        """Return the supplied artifact."""
        return self.artifact

    def __eq__(self, other: object) -> bool:
        """Compare by digest."""
        return isinstance(other, Given) and self.digest_of(self.artifact) == other.digest_of(other.artifact)

    def __hash__(self) -> int:
        """Hash by digest, consistent with ``__eq__``."""
        return hash(self.digest_of(self.artifact))


@dataclass(frozen=True)
class Part(Derived[T]):
    """One attribute of another node's artifact, such as the prefix in the result of a search."""

    of: Node[Any]
    attribute: str

    def make(self, inputs: Inputs) -> T:
        """Return the attribute."""
        found: T = getattr(inputs.get(self.of), self.attribute)
        return found


def nodes_behind(*ends: Node[Any]) -> list[Node[Any]]:
    """Return the given nodes and everything they depend on, each once, in topological order (inputs first)."""
    found: dict[Node[Any], None] = {}

    def visit(node: Node[Any]) -> None:
        if node not in found:
            for other in node.inputs.values():
                visit(other)
            found[node] = None

    for end in ends:
        visit(end)
    return list(found)


def _nodes(named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Node[Any]]]:
    for name, value in named:
        if isinstance(value, Node):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}[{i}]", each) for i, each in enumerate(value) if isinstance(each, Node))


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(each, Node) for each in value)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    digest = getattr(value, "digest", None)
    if isinstance(digest, str):
        return digest
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(map(_plain, value)) if isinstance(value, tuple) else value
