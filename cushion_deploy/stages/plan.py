"""What a pipeline has still to do: which stages are finished in the work folder, found without computing anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from cushion_deploy.stages.base import Derived, Node, Stage, nodes_behind
from cushion_deploy.stages.engine_graph import EngineGraph
from cushion_deploy.stages.run import Inputs, Run
from cushion_deploy.store import StageStore

T = TypeVar("T")


class NotFinished(Exception):
    """An artifact is not there and would have to be computed."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a pipeline.

    Attributes:
        node: the stage.
        finished: whether its artifact is in the work folder, undamaged, so that it is reused. False as well if its
            inputs are not finished: what they will be decides whether an artifact can be reused.
        if_needed: whether a stage that is not finished decides if this one runs, and in which floating-point type.
    """

    node: Stage[Any]
    finished: bool
    if_needed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"stage": self.node.label, "finished": self.finished, "if_needed": self.if_needed}


@dataclass
class ReadOnlyRun(Run):
    """A run that reads finished artifacts and texts, and raises :class:`NotFinished` instead of computing others."""

    _absent: set[Node[Any]] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, run: Run) -> ReadOnlyRun:
        """Return a read-only run on the work folder of another run."""
        return cls(StageStore(run.store.root, read_only=True), run.progress)

    def get(self, node: Node[T]) -> T:
        """Return the artifact of a node; raises NotFinished if it would have to be computed."""
        if node in self._absent:
            raise NotFinished(node.label)
        try:
            return super().get(node)
        except NotFinished:
            # Remembered, because every later stage asks for it again.
            self._absent.add(node)
            raise

    def known(self, node: Node[T]) -> T | None:
        """Return the artifact of a node, or None if it would have to be computed."""
        try:
            return self.get(node)
        except NotFinished:
            return None

    def plan(self, end: Node[Any]) -> list[PlannedStage]:
        """Return the stages that a node depends on, in the order in which they run.

        An export for an engine is listed as what it will be, as far as that is known: not at all where the engine
        compiles the bundle's graph.
        """
        nodes = nodes_behind(end)
        exports = {node.export for node in nodes if isinstance(node, EngineGraph)}
        found: dict[Node[Any], PlannedStage] = {}
        for node in nodes:
            if node in exports:
                continue
            chosen = self._choice(node) if isinstance(node, EngineGraph) else node
            stage = node.export if chosen is None and isinstance(node, EngineGraph) else chosen
            if isinstance(stage, Stage) and (stage not in found or found[stage].if_needed):
                finished = self.known(stage) is not None
                found[stage] = PlannedStage(stage, finished, if_needed=chosen is None and not finished)
        return list(found.values())

    def _choice(self, node: EngineGraph) -> Node[Any] | None:
        """Return the node of the graph that an engine compiles, or None if that is not known yet."""
        try:
            return node.choice(Inputs(self, node))
        except NotFinished:
            return None

    def _execute(self, stage: Stage[T], key: str, inputs: Inputs) -> None:
        raise NotFinished(stage.label)

    def _made(self, node: Derived[T], inputs: Inputs) -> T:
        # The model: loading it takes longer than everything else that is read here.
        if node.timed:
            raise NotFinished(node.label)
        return super()._made(node, inputs)
