"""Run many batches through a model: one after the other or, where weights are streamed, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cushion_deploy.core.progress import Progress
from cushion_deploy.modeling.layerwise import LayerCalls, finish_pass, record_calls
from cushion_deploy.modeling.past_key_values import KeysValues

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner


@dataclass(frozen=True)
class Batch:
    """Text that runs through the model at once.

    Attributes:
        ids: token ids int64 ``[rows, length]`` on the device.
        mask: int64 ``[rows, length]``, 0 on padding; None if nothing is padded.
    """

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Sweep:
    """One sweep over batches; see :meth:`~cushion_deploy.modeling.runner.TorchRunner.sweep`.

    Attributes:
        model: the model.
        batches: all batches, of which this process runs its share.
        past: keys and values before every batch.
        before, after: called around each batch.
        progress, task: where to report the rows that are done, and as what.
    """

    model: TorchRunner
    batches: Sequence[Batch]
    past: KeysValues
    before: Callable[[int], None]
    after: Callable[[int, Tensor], None]
    progress: Progress
    task: str

    def run(self) -> None:
        """Run this process's share of the batches."""
        mine = self.model.processes.mine(len(self.batches))
        if self.model.placed.streamed_layers:
            self._layer_by_layer(mine, list(self.model.layers))
        else:
            self._one_by_one(mine)

    def _one_by_one(self, mine: range) -> None:
        done, total = 0, self._rows(mine)
        for number in mine:
            self._finish(number, self._pass(number))
            done += len(self.batches[number].ids)
            self.progress(self.task, done, total)

    def _layer_by_layer(self, mine: range, layers: list[nn.Module]) -> None:
        done, total = 0, self._rows(mine) * len(layers)
        calls = {number: self._recorded(number, layers) for number in mine}
        for index, layer in enumerate(layers):
            with self.model.placed.held(layer):
                for number in mine:
                    batch = self.batches[number]
                    self.before(number)
                    self.model.current.begin(len(batch.ids), batch.mask)
                    calls[number].run(layer, index)
                    done += len(batch.ids)
                    self.progress(self.task, done, total)
        for number in mine:
            found = calls.pop(number)
            self._finish(number, finish_pass(layers, found, lambda number=number: self._pass(number)))  # type: ignore[misc]

    def _recorded(self, number: int, layers: list[nn.Module]) -> LayerCalls:
        return record_calls(layers, lambda: self._pass(number))

    def _pass(self, number: int) -> Any:
        batch = self.batches[number]
        self.before(number)
        return self.model.run(batch.ids, self.past, batch.mask, head=False)

    def _finish(self, number: int, output: Any) -> None:
        hidden = output.last_hidden_state
        for watcher in self.model.watchers:
            watcher(hidden)
        self.after(number, hidden)

    def _rows(self, mine: range) -> int:
        return sum(len(self.batches[number].ids) for number in mine)
