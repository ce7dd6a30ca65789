"""What a stage is: declared inputs, a version, and one artifact that is kept in the work folder."""

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
    """What one token position costs on this machine, in seconds, and the model that was measured.

    Attributes:
        spec: the model.
        layers: a position through all layers, without the output head.
        whole: a position through all layers and the head.
    """

    spec: ModelSpec
    layers: float
    whole: float


@dataclass(frozen=True)
class Node(ABC, Generic[T]):
    """Something that has one artifact, of type ``T``.

    A node is a frozen dataclass. Its fields are everything that decides the artifact: nodes, whose artifacts are its
    inputs, and settings. So the nodes that a build ends with hold the whole graph of what the build depends on. A field
    with ``compare=False`` decides nothing: a title, or a node that only saves work.
    """

    @property
    def label(self) -> str:
        """What people read of it."""
        return type(self).__name__

    @property
    def inputs(self) -> dict[str, Node[Any]]:
        """The nodes among the fields, by name; those of a tuple as ``name[i]``."""
        return dict(_nodes(self._fields(deciding=True)))

    @property
    def helpers(self) -> dict[str, Node[Any]]:
        """The nodes among the fields that decide nothing, by name."""
        return dict(_nodes(self._fields(deciding=False)))

    @property
    def settings(self) -> dict[str, Any]:
        """The other fields, JSON-ready; what has a digest is represented by it."""
        found = {name: value for name, value in self._fields(deciding=True) if not isinstance(value, Node)}
        return {name: _plain(value) for name, value in found.items() if not _holds_nodes(value)}

    def _fields(self, *, deciding: bool) -> Iterator[tuple[str, Any]]:
        for field in fields(self):
            if field.compare is deciding:
                yield field.name, getattr(self, field.name)

    @property
    def known_digest(self) -> str | None:
        """The digest of the artifact where that is known without making it; None elsewhere."""
        return None

    def digest_of(self, artifact: T) -> str:
        """Return the SHA-256 (hex) that identifies the artifact in the keys of later stages."""
        found: str = artifact.digest  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Derived(Node[T]):
    """A node whose artifact is made anew in every process: loaded, put together, or given."""

    timed: ClassVar[bool] = False
    """Whether the time that it takes is a row of the report."""

    @abstractmethod
    def make(self, inputs: Inputs) -> T:
        """Return the artifact."""


@dataclass(frozen=True)
class Stage(Node[T]):
    """A node whose artifact is kept in the work folder, and reused where version, settings and inputs are the same.

    ``version`` is raised whenever a change of the code may change the artifact: the code itself is not part of the
    key. ``tests/stages/test_fingerprints.py`` asks for that decision at every change.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    def label(self) -> str:
        """The name; a stage that stands in a pipeline more than once adds what makes the difference."""
        return self.name

    @abstractmethod
    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the artifact into the empty folder ``out``."""

    @abstractmethod
    def read(self, folder: Path) -> T:
        """Return the artifact that :meth:`run` wrote, now or in an earlier process."""

    def shortcut(self, inputs: Inputs) -> T | None:
        """Return the artifact where nothing has to be done for it; None where the stage has to run."""
        return None

    def room(self, inputs: Inputs) -> int:
        """Return about how many bytes the artifact takes, where that is much; asked only before the stage runs."""
        return 0

    def disk(self, spec: ModelSpec) -> int:
        """Return about how many bytes the artifact takes, by the size of the model; 0 where that is little."""
        return 0

    def seconds(self, speed: Speed) -> float:
        """Return about how long the stage takes; 0 where that is little."""
        return 0.0


@dataclass(frozen=True)
class Given(Derived[T]):
    """An artifact that somebody handed in, such as a prefix from a file; identified by its digest."""

    artifact: T

    def make(self, inputs: Inputs) -> T:
        """Return it."""
        return self.artifact

    def __eq__(self, other: object) -> bool:
        """Two are the same where their digests are."""
        return isinstance(other, Given) and self.digest_of(self.artifact) == other.digest_of(other.artifact)

    def __hash__(self) -> int:
        """Agree with ``__eq__``."""
        return hash(self.digest_of(self.artifact))


@dataclass(frozen=True)
class Part(Derived[T]):
    """One attribute of another node's artifact, such as the prefix among what a search found."""

    of: Node[Any]
    attribute: str

    def make(self, inputs: Inputs) -> T:
        """Return the attribute."""
        found: T = getattr(inputs.get(self.of), self.attribute)
        return found


def nodes_behind(*ends: Node[Any]) -> list[Node[Any]]:
    """Return every node that some nodes depend on, themselves included: each once, inputs before what takes them."""
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
