"""A stage is kept by its inputs, its settings and its version; a run makes what is missing, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from cushion_deploy.errors import UsageError
from cushion_deploy.stages.base import Derived, Given, Node, Part, Stage, nodes_behind
from cushion_deploy.stages.run import Inputs, Run
from cushion_deploy.store import StageStore
from cushion_deploy.store.digests import digest_json

RAN: list[str] = []


@dataclass(frozen=True)
class Number:
    """An artifact."""

    value: int

    @property
    def digest(self) -> str:
        return digest_json(self.value)


class Settings(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(frozen=True)
    factor: int = 1


@dataclass(frozen=True)
class Add(Stage[Number]):
    """Adds."""

    name: ClassVar[str] = "add"
    version: ClassVar[int] = 1
    left: Node[Number]
    right: Node[Number]
    settings_of: Settings = field(default_factory=Settings)
    title: str = field(default="", compare=False)
    helper: Node[Number] | None = field(default=None, compare=False)

    def run(self, inputs: Inputs, out: Path) -> None:
        RAN.append(self.name)
        total = inputs.get(self.left).value + inputs.get(self.right).value
        if self.helper:
            inputs.get(self.helper)
        (out / "number").write_text(str(total * self.settings_of.factor))

    def read(self, folder: Path) -> Number:
        return Number(int((folder / "number").read_text()))


@dataclass(frozen=True)
class Double(Derived[Number]):
    """Doubles, in memory."""

    timed: ClassVar[bool] = True
    of: Node[Number]

    def make(self, inputs: Inputs) -> Number:
        RAN.append("double")
        return Number(2 * inputs.get(self.of).value)


@dataclass(frozen=True)
class Sum(Stage[Number]):
    """Adds any number of inputs."""

    name: ClassVar[str] = "sum"
    version: ClassVar[int] = 1
    parts: tuple[Node[Number], ...]

    def run(self, inputs: Inputs, out: Path) -> None:
        RAN.append(self.name)
        (out / "number").write_text(str(sum(inputs.get(part).value for part in self.parts)))

    def read(self, folder: Path) -> Number:
        return Number(int((folder / "number").read_text()))


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run on an empty work folder."""
    return Run(StageStore(tmp_path))


def one(value: int) -> Given[Number]:
    return Given(Number(value))


def test_a_stage_runs_once_and_is_reused_by_a_later_run(run: Run) -> None:
    node = Add(one(1), one(2))
    assert (run.get(node), run.get(Add(one(1), one(2)))) == (Number(3), Number(3))
    assert RAN == ["add"]
    again = Run(run.store)
    assert again.get(node) == Number(3)
    assert RAN == ["add"]
    assert [(t.stage, t.reused) for t in (*run.times, *again.times)] == [("add", False), ("add", True)]


def test_a_key_is_name_version_settings_and_inputs_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Add(one(1), one(2))
    key = run.key(node)
    assert run.key(Add(one(1), one(2), title="for people", helper=one(9))) == key
    others = [Add(one(2), one(1)), Add(one(1), one(2), Settings(factor=2)), Add(one(1), Double(one(2)))]
    keys = {run.key(other) for other in others}
    # Two inputs of equal content give equal keys, whatever made them.
    assert run.key(Add(one(1), Double(one(1)))) == key
    monkeypatch.setattr(Add, "version", 2)
    keys.add(run.key(node))
    assert len(keys | {key}) == 5


def test_a_change_that_leaves_an_input_as_it_was_runs_nothing_behind_it(run: Run) -> None:
    first = Sum((Add(one(1), one(4)), one(1)))
    second = Sum((Add(one(2), one(3)), one(1)))
    assert run.get(first) == run.get(second) == Number(6)
    assert RAN == ["add", "sum", "add"]


def test_a_stage_cannot_use_what_its_key_does_not_know(run: Run) -> None:
    @dataclass(frozen=True)
    class Sneaky(Add):
        """Takes an input that it does not declare."""

        name: ClassVar[str] = "sneaky"
        version: ClassVar[int] = 1

        def run(self, inputs: Inputs, out: Path) -> None:
            inputs.get(one(7))

    with pytest.raises(ValueError, match="stage sneaky does not declare"):
        run.get(Sneaky(one(1), one(2)))
    assert run.get(Add(one(1), one(2), helper=one(9))) == Number(3)


def test_nothing_is_left_of_a_stage_that_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise UsageError("no", hint="try again")

    with monkeypatch.context() as patch:
        patch.setattr(Add, "run", broken)
        with pytest.raises(UsageError, match="no"):
            run.get(Add(one(1), one(2)))
    assert run.times == []
    assert run.get(Add(one(1), one(2))) == Number(3)


def test_a_digest_that_is_known_is_not_made(run: Run) -> None:
    @dataclass(frozen=True)
    class Large(Double):
        """Knows its digest without being made."""

        @property
        def known_digest(self) -> str:
            return "d"

    node = Add(Large(one(1)), one(2))
    run.get(node)
    RAN.clear()
    assert Run(run.store).get(node) == Number(4)
    assert RAN == []


def test_the_time_of_an_input_is_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cushion_deploy.stages.run.time.monotonic", lambda: now[0])
    make, add = Double.make, Add.run

    def slowly(self: Double, inputs: Inputs) -> Number:
        now[0] += 5.0
        return make(self, inputs)

    def adding(self: Add, inputs: Inputs, out: Path) -> None:
        now[0] += 1.0
        add(self, inputs, out)

    monkeypatch.setattr(Double, "make", slowly)
    monkeypatch.setattr(Add, "run", adding)
    monkeypatch.setattr(Double, "known_digest", "d")
    run.get(Add(Double(one(1)), one(2)))
    assert [(t.stage, t.seconds) for t in run.times] == [("Double", 5.0), ("add", 1.0)]


def test_a_part_of_an_artifact_is_a_node(run: Run) -> None:
    value: Node[int] = Part(Add(one(1), one(2)), "value")
    assert run.get(value) == 3


def test_nodes_come_before_what_takes_them_and_once() -> None:
    shared = Add(one(1), one(2))
    end = Sum((shared, Double(shared)))
    order = nodes_behind(end)
    assert len(order) == len(set(order)) == 5
    for node in order:
        assert all(order.index(other) < order.index(node) for other in node.inputs.values())


def test_a_watcher_learns_which_of_how_many_stages_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Telling(Add):
        """Reports once."""

        name: ClassVar[str] = "telling"
        version: ClassVar[int] = 1

        def run(self, inputs: Inputs, out: Path) -> None:
            inputs.progress("adding", 1, 1)
            super().run(inputs, out)

    told: list[str] = []

    class Watcher:
        """Writes down what it is told."""

        def begin(self, stage: str, number: int, total: int) -> None:
            told.append(f"{stage} {number}/{total}")

        def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
            told.append(f"{stage} {number}/{total} {'reused' if reused else 'done'}")

        def stop(self) -> None:
            told.append("stopped")

    def run() -> Run:
        return Run(StageStore(tmp_path), lambda task, done, total, note="": told.append(task), watcher=Watcher())

    first, second = Telling(one(1), one(2)), Telling(one(3), one(4))
    end = Sum((first, second))
    whole = run()
    whole.number(end)
    whole.get(end)
    whole.get(Telling(one(5), one(6)))
    assert told == [
        *("telling 1/3", "adding", "telling 1/3 done", "telling 2/3", "adding", "telling 2/3 done"),
        *("sum 3/3", "sum 3/3 done", "telling 0/0", "adding", "telling 0/0 done"),
    ]
    told.clear()
    again = run()
    again.number(end)
    again.get(end)
    assert told == ["telling 1/3 reused", "telling 2/3 reused", "sum 3/3 reused"]
    told.clear()
    monkeypatch.setattr(Telling, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run().get(Telling(one(7), one(8)))
    assert told == ["telling 0/0", "stopped"]
