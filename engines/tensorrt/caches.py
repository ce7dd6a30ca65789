"""Keys and values in device memory: two sets of buffers in alternation, or one set updated in place.

Shapes in comments: B batch, K key/value heads, C capacity, D head size, P prefix slots. A row is one head of one
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import CACHE_BYTES, bfloat16_bits, first_caches, past_names
from cushion_deploy.engines.tensorrt.cuda import Cuda, DeviceBuffer

Allocate = Callable[[int], DeviceBuffer]
"""Size in bytes to device memory."""
Initial = Callable[[int], Iterable[npt.NDArray[Any]]]
"""Batch size to the initial content of every cache, ``[B, K, P, D]`` each."""


class Binding(NamedTuple):
    """One cache tensor of a call: input name, shape and address; output name and address."""

    past: str
    shape: tuple[int, ...]
    read: int
    present: str
    written: int


class Caches(Protocol):
    """The keys and values of all layers; lengths count the caller's tokens, without the prefix slots."""

    def seed(self, batch: int) -> None:
        """Queue the initial content of the caches of a new batch."""
        ...

    def bindings(self, batch: int, past: int, new: int) -> Iterator[Binding]:
        """Yield what to bind for ``new`` tokens after ``past`` slots."""
        ...

    def advance(self) -> None:
        """Make what the last call wrote the past of the next."""
        ...

    def keep(self, batch: int, held: int, length: int) -> None:
        """Queue the work that keeps only the first ``length`` of ``held`` tokens."""
        ...


class GrowingCaches:
    """Two sets of buffers: a call reads one and writes past and new tokens, concatenated, to the other.

    Args:
        cuda: the stream.
        allocate: allocates device memory of a size in bytes.
        contract: contract of the plan.
        initial: gives the initial content of every cache for a batch size.
        batch, total: largest B, and largest length of a cache after a call.
    """

    def __init__(
        self, cuda: Cuda, allocate: Allocate, contract: GraphContract, initial: Initial, batch: int, total: int
    ) -> None:
        """Allocate both sets."""
        self._cuda, self._contract, self._initial = cuda, contract, initial
        self._past = past_names(contract)
        self._token = contract.head_dim * CACHE_BYTES[contract.cache_dtype]
        size = batch * contract.num_kv_heads * total * self._token
        self._sets = [[allocate(size) for _ in self._past] for _ in range(2)]

    def seed(self, batch: int) -> None:
        """Queue the prefix, unless it is in the graph."""
        for buffer, array in zip(self._sets[0], self._initial(batch), strict=True):
            self._cuda.upload(array, buffer)

    def bindings(self, batch: int, past: int, new: int) -> Iterator[Binding]:
        """Yield the set to read and the set to write."""
        c = self._contract
        slot = batch * c.num_kv_heads * self._token
        for name, source, target in zip(self._past, *self._sets, strict=True):
            shape = (batch, c.num_kv_heads, past, c.head_dim)
            yield Binding(name, shape, source.at(past * slot), _present(name), target.at((past + new) * slot))

    def advance(self) -> None:
        """Swap the sets."""
        self._sets.reverse()

    def keep(self, batch: int, held: int, length: int) -> None:
        """Queue copies of the first tokens of every row to the other set, and swap the sets."""
        if length == held:
            return
        pitch, width = ((self._contract.prefix_slots + n) * self._token for n in (held, length))
        for source, target in zip(*self._sets, strict=True):
            self._cuda.copy_rows(source, pitch, target, width, batch * self._contract.num_kv_heads)
        self._sets.reverse()


class InPlaceCaches:
    """One set of buffers ``[B, K, C, D]``, input and output of every call; the prefix stays in the first slots.

    Slots after the kept tokens are kept at zero. Attention reads them with weight 0, and 0 times an infinity that an
    earlier text left there would be NaN.

    Args:
        cuda: the stream.
        allocate: allocates device memory of a size in bytes.
        contract: contract of the plan, with its capacity.
        initial: gives the initial content of every cache for a batch size.
        batch: largest B.
    """

    def __init__(self, cuda: Cuda, allocate: Allocate, contract: GraphContract, initial: Initial, batch: int) -> None:
        """Allocate the set."""
        self._cuda, self._contract, self._initial = cuda, contract, initial
        self._past = past_names(contract)
        self._token = contract.head_dim * CACHE_BYTES[contract.cache_dtype]
        self._pitch = contract.cache_capacity * self._token
        self._buffers = [allocate(batch * contract.num_kv_heads * self._pitch) for _ in self._past]
        self._seeded = 0

    def seed(self, batch: int) -> None:
        """Queue zeros after the prefix, and the prefix itself if it was not written for as many rows before."""
        c = self._contract
        if batch <= self._seeded:
            self._clear(c.prefix_slots, self._seeded)
            return
        # If this is interrupted, no row counts as seeded.
        self._seeded = 0
        self._clear(0, batch)
        for buffer, array in zip(self._buffers, self._initial(batch), strict=True):
            self._cuda.upload_rows(array.reshape(batch * c.num_kv_heads, -1), buffer, self._pitch)
        self._cuda.synchronize()
        self._seeded = batch

    def bindings(self, batch: int, past: int, new: int) -> Iterator[Binding]:
        """Yield each buffer as both input and output; the plan reads ``past`` and ``new`` from its other inputs."""
        c = self._contract
        for name, buffer in zip(self._past, self._buffers, strict=True):
            address = buffer.at(batch * c.num_kv_heads * self._pitch)
            shape = (batch, c.num_kv_heads, c.cache_capacity, c.head_dim)
            yield Binding(name, shape, address, _present(name), address)

    def advance(self) -> None:
        """Do nothing: the plan writes where it reads."""

    def keep(self, batch: int, held: int, length: int) -> None:
        """Queue zeros after the kept tokens, which also clears what a failed call wrote."""
        self._clear(self._contract.prefix_slots + length, self._seeded)

    def _clear(self, kept: int, batch: int) -> None:
        """Queue zeros after the first ``kept`` slots of every row of a batch."""
        rows, offset = batch * self._contract.num_kv_heads, kept * self._token
        for buffer in self._buffers:
            self._cuda.clear_rows(buffer, offset, self._pitch, self._pitch - offset, rows)


def initial_content(
    contract: GraphContract, prefix: Prefix | None, kv: KvScales | None, batch: int
) -> Iterator[npt.NDArray[Any]]:
    """Yield the initial content of every cache, in the bytes of device memory."""
    for array in first_caches(contract, prefix, batch, kv):
        yield bfloat16_bits(array) if contract.cache_dtype == "bfloat16" else array


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")
