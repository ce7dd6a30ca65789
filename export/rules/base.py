"""What a rule is: the part of a graph that it examines, and the violations that it finds there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cushion_deploy.export.rules.quantized_graph import QuantizedGraph

T = TypeVar("T")


@dataclass(frozen=True)
class Violation:
    """One broken rule: where, what was found there, what to do."""

    node: str
    found: str
    remedy: str

    def __str__(self) -> str:
        """Return the three in one line."""
        return f"{self.node}: {self.found}; {self.remedy}"


@dataclass(frozen=True)
class Rule(Generic[T]):
    """One property that the finished graph must have.

    Attributes:
        name: as it is written to ``export.json`` and into errors, e.g. ``zero-points``.
        subjects: returns the nodes or tensors that the rule examines; their number shows that it did not hold for
            want of anything to look at.
        check: yields the violations of one subject.
    """

    name: str
    subjects: Callable[[QuantizedGraph], Sequence[T]]
    check: Callable[[QuantizedGraph, T], Iterator[Violation]]

    def run(self, graph: QuantizedGraph) -> tuple[int, list[Violation]]:
        """Return how many subjects the rule examined, and all violations."""
        subjects = self.subjects(graph)
        return len(subjects), [violation for subject in subjects for violation in self.check(graph, subject)]
