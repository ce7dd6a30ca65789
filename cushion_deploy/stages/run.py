"""Run a pipeline: reuse the finished stages, run the others, and time both."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from cushion_deploy.core.processes import SINGLE, Processes
from cushion_deploy.core.progress import Progress, StageWatcher, Unwatched, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.stages.base import Derived, Node, Stage, nodes_behind
from cushion_deploy.store import StageStore, require_space
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import temporary_folder

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageTime:
    """Wall time of one stage in this run.

    Attributes:
        stage: label of the stage.
        seconds: wall time.
        reused: whether the result of an earlier run was used.
        ran_on: device, floating-point type and, if there were several, processes that computed the result; empty if it
            needed no model.
    """

    stage: str
    seconds: float
    reused: bool
    ran_on: str = ""


@dataclass
class Run:
    """Makes the artifacts of nodes, each once.

    Attributes:
        store: the work folder.
        progress: receives progress of long tasks.
        times: the stages of this run, in the order in which they finished.
        processes: the processes that share the work.
        watcher: told which stage is running.
    """

    store: StageStore
    progress: Progress = silent
    times: list[StageTime] = field(default_factory=list)
    processes: Processes = SINGLE
    watcher: StageWatcher = field(default_factory=Unwatched)
    _artifacts: dict[Node[Any], Any] = field(default_factory=dict, repr=False)
    _counted: set[Node[Any]] = field(default_factory=set, repr=False)
    _ended: int = field(default=0, repr=False)

    def number(self, end: Node[Any]) -> None:
        """Count the stages that a node depends on, so that the watcher learns which of how many is running."""
        self._counted = {node for node in nodes_behind(end) if isinstance(node, Stage)}
        self._ended = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the work folder; of several processes, the first one does."""
        with self.store.lock() if self.processes.leads else nullcontext():
            yield

    def get(self, node: Node[T]) -> T:
        """Return the artifact of a node, making the artifacts that it depends on first if necessary.

        Raises:
            UsageError: a stage has to run and the disk has no room for its artifact.
        """
        if node not in self._artifacts:
            inputs = Inputs(self, node)
            if isinstance(node, Stage):
                self._artifacts[node] = self._kept(node, inputs)
            else:
                with self._clock(node):
                    self._artifacts[node] = self._made(cast(Derived[T], node), inputs)
        return cast(T, self._artifacts[node])

    def digest(self, node: Node[Any]) -> str:
        """Return the digest of a node's artifact, without making the artifact if possible."""
        known = node.known_digest
        return node.digest_of(self.get(node)) if known is None else known

    def key(self, stage: Stage[Any]) -> str:
        """Return the key of a stage's artifact: a digest of name, version, settings and input digests."""
        inputs = {name: self.digest(node) for name, node in stage.inputs.items()}
        decided_by = {"version": stage.version, "settings": stage.settings, "inputs": inputs}
        return digest_json({"stage": stage.name, **decided_by})

    @property
    def seconds(self) -> float:
        """Total time of all stages."""
        return sum(t.seconds for t in self.times)

    def _kept(self, stage: Stage[T], inputs: Inputs) -> T:
        found = stage.shortcut(inputs)
        if found is not None:
            self._ended += stage in self._counted
            return found
        key = self.key(stage)
        start, inner = time.monotonic(), self.seconds
        folder = self.store.find(stage.name, key) if self.processes.leads else None
        reused = self._leader_says(folder is not None)
        if not reused:
            logger.info("%s: running", stage.label)
            self.watcher.begin(stage.label_of(inputs), *self._number(stage))
            try:
                self._execute(stage, key, inputs)
            except BaseException:
                self.watcher.stop()
                raise
        if folder is None:
            folder = self.store.find(stage.name, key)
        if folder is None:
            raise UsageError(f"stage {stage.name} vanished from {self.store.root}", hint="do not touch the work folder")
        # Inputs that were requested while the stage ran have their own times.
        seconds = time.monotonic() - start - (self.seconds - inner)
        ran_on = self.store.facts(stage.name, key).get("ran_on", "")
        self.times.append(StageTime(stage.label_of(inputs), seconds, reused, ran_on))
        self.watcher.end(stage.label_of(inputs), *self._number(stage), reused=reused)
        self._ended += stage in self._counted
        return stage.read(folder)

    def _number(self, stage: Stage[Any]) -> tuple[int, int]:
        """Return which of how many stages this is, in the order in which they end; twice 0 if it is not counted."""
        return (self._ended + 1, len(self._counted)) if stage in self._counted else (0, 0)

    def _execute(self, stage: Stage[T], key: str, inputs: Inputs) -> None:
        """Run a stage: its artifact is written by the first process, and every process waits for it."""
        if self.processes.size > 1:
            # Made by all processes together, before some of them run the stage and others wait.
            for node in (*stage.inputs.values(), *stage.helpers.values()):
                self.get(node)
        if not self.processes.leads:
            if stage.shared:
                with temporary_folder("cushion-") as unused:
                    stage.run(inputs, unused)
        else:
            if room := stage.room(inputs):
                require_space(self.store.root, room)
            facts: dict[str, str] = {}
            with self.store.write(stage.name, key, facts) as folder:
                stage.run(inputs, folder)
                facts["ran_on"] = self._ran_on(stage)
        self._leader_says(True)

    def _ran_on(self, stage: Stage[T]) -> str:
        """Return on what the models among a stage's inputs run; empty if it runs none."""
        if not stage.runs_model:
            return ""
        inputs = (*stage.inputs.values(), *stage.helpers.values())
        found = [node.ran_on(self._artifacts[node]) for node in inputs if node in self._artifacts]
        together = f", {self.processes.size} processes" if self.processes.size > 1 and stage.shared else ""
        return next((f"{text}{together}" for text in found if text), "")

    def _leader_says(self, value: bool) -> bool:
        if self.processes.size == 1:
            return value
        from cushion_deploy.modeling.processes import leader_says

        return leader_says(value, self.processes)

    def _made(self, node: Derived[T], inputs: Inputs) -> T:
        if node.exclusive:
            for other in [found for found in self._artifacts if type(found) is type(node)]:
                del self._artifacts[other]
            # Hooks of streamed layers are reference cycles.
            gc.collect()
        return node.make(inputs)

    @contextmanager
    def _clock(self, node: Node[Any]) -> Iterator[None]:
        start, inner = time.monotonic(), self.seconds
        yield
        if isinstance(node, Derived) and node.timed:
            self.times.append(StageTime(node.label, time.monotonic() - start - (self.seconds - inner), False))


@dataclass(frozen=True)
class Inputs:
    """What a running node may access: the artifacts of its inputs, progress, and a folder for partial results.

    Attributes:
        run: the run that makes the artifacts.
        node: the running node.
    """

    run: Run
    node: Node[Any]

    def get(self, node: Node[T]) -> T:
        """Return the artifact of one of the node's inputs.

        Raises:
            ValueError: the node requests a node that is not one of its inputs, on which its key would not depend.
        """
        declared = (*self.node.inputs.values(), *self.node.helpers.values())
        if isinstance(self.node, Stage) and node not in declared:
            raise ValueError(f"stage {self.node.name} does not declare the input {node.label}")
        return self.run.get(node)

    @property
    def progress(self) -> Progress:
        """Receives progress of long tasks."""
        return self.run.progress

    @property
    def scratch(self) -> Path:
        """A folder for partial results of the stage; it survives a killed process, and is deleted at the end."""
        stage = cast(Stage[Any], self.node)
        return self.run.store.scratch(stage.name, self.run.key(stage))
