"""Split rings in plain memory: written as a driver does, worked by either queue of ours.

`FastRing` and `SlowRing` make `SplitQueue` and `SlowQueue` look the same, so that a test can run on
both and compare them.  Nothing here believes in the library's layout: offsets are the standard's.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.virtio.slow_queue import Piece, SlowQueue
from vfio_user_virtio.virtio.split_queue import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

T = TypeVar("T")

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4

DESC: Final = 0x0
AVAIL: Final = 0x4000
USED: Final = 0x5000
TABLES: Final = 0x8000
BUFFERS: Final = 0x1_0000
MEMORY_SIZE: Final = 0x1_8000
"""Where things are in a `RingMemory`: rings of up to 1,024, then what they point to."""


def finish(work: Coroutine[object, object, T]) -> T:
    """The result of async code that never has to wait."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waited")


class RingMemory:
    """Guest memory from IOVA 0 on, and nothing beyond it."""

    def __init__(self, size: int = MEMORY_SIZE) -> None:
        self.data = bytearray(size)
        self._view = memoryview(self.data)
        self._given: dict[int, tuple[memoryview, Piece]] = {}
        self.reads = 0
        """Calls of `read` so far."""

    def view(self, iova: int, size: int) -> memoryview:
        return self._view[iova : iova + size]

    def _check(self, iova: int, size: int) -> None:
        if iova + size > len(self.data):
            raise DriverError(f"no memory at {iova:#x}")

    def views_of(self, iova: int, size: int, write: bool) -> list[memoryview]:
        """What `SplitQueue` asks for; `pieces` tells where a view came from."""
        if not size:
            return []
        self._check(iova, size)
        view = self.view(iova, size) if write else self.view(iova, size).toreadonly()
        self._given[id(view)] = view, Piece(iova, size)
        return [view]

    def pieces(self, views: Sequence[memoryview], *, writable: bool) -> list[Piece]:
        assert all(view.readonly != writable for view in views)
        return [self._given[id(view)][1] for view in views]

    async def read(self, iova: int, size: int) -> bytes:
        self._check(iova, size)
        self.reads += 1
        return bytes(self.view(iova, size))

    async def write(self, iova: int, data: bytes) -> None:
        self._check(iova, len(data))
        self.data[iova : iova + len(data)] = data


class Taken(NamedTuple):
    """A chain that a device took; pieces of no bytes are left out."""

    head: int
    readable: list[Piece]
    writable: list[Piece]


class Ring(Protocol):
    """A queue at work in `memory`."""

    memory: RingMemory
    size: int

    @property
    def position(self) -> tuple[int, int]:
        """next_avail, next_used."""
        ...

    def start(self, next_avail: int, next_used: int) -> None: ...
    def take(self) -> Taken | None: ...
    def give_back(self, entries: int = 1) -> None: ...
    def put(self, head: int, written: int) -> None: ...
    def publish(self) -> None: ...
    def should_interrupt(self) -> bool: ...
    def disable_kicks(self) -> None: ...
    def enable_kicks(self) -> bool: ...


class FastRing:
    def __init__(
        self,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = True,
        memory_size: int = MEMORY_SIZE,
    ) -> None:
        self.memory = RingMemory(memory_size)
        self.size = size
        self.queue = SplitQueue(
            size,
            self.memory.view(DESC, 16 * size).toreadonly(),
            self.memory.view(AVAIL, 6 + 2 * size).toreadonly(),
            self.memory.view(USED, 6 + 8 * size),
            views_of=self.memory.views_of,
            event_idx=event_idx,
            indirect=indirect,
        )
        self.start = self.queue.start
        self.give_back = self.queue.give_back
        self.put = self.queue.put
        self.publish = self.queue.publish
        self.should_interrupt = self.queue.should_interrupt
        self.disable_kicks = self.queue.disable_kicks
        self.enable_kicks = self.queue.enable_kicks

    @property
    def position(self) -> tuple[int, int]:
        return self.queue.next_avail, self.queue.next_used

    def take(self) -> Taken | None:
        chain = self.queue.take()
        if chain is None:
            return None
        return Taken(
            chain.head,
            self.memory.pieces(chain.readable, writable=False),
            self.memory.pieces(chain.writable, writable=True),
        )


class SlowRing:
    def __init__(
        self,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = True,
        memory_size: int = MEMORY_SIZE,
    ) -> None:
        self.memory = RingMemory(memory_size)
        self.size = size
        self.queue = SlowQueue(
            size, DESC, AVAIL, USED, memory=self.memory, event_idx=event_idx, indirect=indirect
        )
        self.start = self.queue.start
        self.give_back = self.queue.give_back

    @property
    def position(self) -> tuple[int, int]:
        return self.queue.next_avail, self.queue.next_used

    def take(self) -> Taken | None:
        chain = finish(self.queue.take())
        if chain is None:
            return None
        return Taken(
            chain.head,
            [piece for piece in chain.readable if piece.size],
            [piece for piece in chain.writable if piece.size],
        )

    def put(self, head: int, written: int) -> None:
        finish(self.queue.put(head, written))

    def publish(self) -> None:
        finish(self.queue.publish())

    def should_interrupt(self) -> bool:
        return finish(self.queue.should_interrupt())

    def disable_kicks(self) -> None:
        finish(self.queue.disable_kicks())

    def enable_kicks(self) -> bool:
        return finish(self.queue.enable_kicks())


class Descriptor(NamedTuple):
    """One descriptor, as the standard lays it out."""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def encode(self) -> bytes:
        return struct.pack("<QIHH", *self)


class RingDriver:
    """The driver's hand in one or several memories, all written alike."""

    def __init__(self, size: int, *memories: RingMemory) -> None:
        self.size = size
        self._memories = memories
        self.available = 0

    def poke(self, iova: int, data: bytes) -> None:
        for memory in self._memories:
            memory.data[iova : iova + len(data)] = data

    def peek(self, iova: int, size: int) -> bytes:
        values = {bytes(memory.view(iova, size)) for memory in self._memories}
        assert len(values) == 1, "the queues left different bytes"
        return values.pop()

    def write_table(self, address: int, descriptors: Sequence[Descriptor]) -> None:
        self.poke(address, b"".join(d.encode() for d in descriptors))

    def start(self, index: int) -> None:
        """A ring in which both sides stand at `index`."""
        self.available = index
        self.publish(index)

    def offer(self, *heads: int) -> None:
        """Make chains available and publish them."""
        for head in heads:
            self.enter(head)
        self.publish(self.available)

    def enter(self, head: int) -> None:
        """Fill the next available entry, not yet to be seen."""
        slot = self.available % self.size
        self.poke(AVAIL + 4 + 2 * slot, head.to_bytes(2, "little"))
        self.available = (self.available + 1) % 0x1_0000

    def publish(self, index: int) -> None:
        self.poke(AVAIL + 2, index.to_bytes(2, "little"))

    def set_no_interrupt(self, *, on: bool) -> None:
        self.poke(AVAIL, bytes([on, 0]))

    def set_used_event(self, index: int) -> None:
        self.poke(AVAIL + 4 + 2 * self.size, index.to_bytes(2, "little"))

    @property
    def used_flags(self) -> int:
        return int.from_bytes(self.peek(USED, 2), "little")

    @property
    def used_index(self) -> int:
        return int.from_bytes(self.peek(USED + 2, 2), "little")

    @property
    def avail_event(self) -> int:
        return int.from_bytes(self.peek(USED + 4 + 8 * self.size, 2), "little")

    def used(self, index: int) -> tuple[int, int]:
        """Used entry `index` (free-running): id and length."""
        head, written = struct.unpack("<II", self.peek(USED + 4 + 8 * (index % self.size), 8))
        return head, written
