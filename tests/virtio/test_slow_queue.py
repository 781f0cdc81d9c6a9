"""The ring by copies: buffers, and being stopped between any two steps.

What it has in common with the mapped one is tested with that (test_split_queue, test_rings_agree).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.rings import (
    AVAIL,
    BUFFERS,
    DESC,
    INDIRECT,
    NEXT,
    TABLES,
    USED,
    WRITE,
    Descriptor,
    RingDriver,
    RingMemory,
    SlowRing,
    finish,
)
from vfio_user_virtio.errors import ConnectionLost, DriverError
from vfio_user_virtio.virtio.slow_queue import Piece, QueueStopped, SlowQueue, total

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SIZE: Final = 4


class CountedMemory(RingMemory):
    """Memory that stops the queue during access number `fatal`, counted from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.accesses = 0
        self.fatal = -1
        self.stop: Callable[[], None] = lambda: None

    def _count(self) -> None:
        if self.accesses == self.fatal:
            self.stop()
        self.accesses += 1

    async def read(self, iova: int, size: int) -> bytes:
        data = await super().read(iova, size)
        self._count()
        return data

    async def write(self, iova: int, data: bytes) -> None:
        await super().write(iova, data)
        self._count()


def a_queue(*, event_idx: bool = False) -> tuple[SlowQueue, CountedMemory]:
    """A queue with one chain: a readable and two writable descriptors in a table."""
    memory = CountedMemory()
    queue = SlowQueue(SIZE, DESC, AVAIL, USED, memory=memory, event_idx=event_idx, indirect=True)
    driver = RingDriver(SIZE, memory)
    driver.write_table(DESC, [Descriptor(TABLES, 48, INDIRECT)])
    driver.write_table(
        TABLES,
        [
            Descriptor(BUFFERS, 10, NEXT, 1),
            Descriptor(BUFFERS + 10, 3, WRITE | NEXT, 2),
            Descriptor(BUFFERS + 0x100, 5, WRITE),
        ],
    )
    driver.poke(BUFFERS, b"0123456789")
    driver.offer(0)
    memory.stop = queue.stop
    return queue, memory


async def serve(queue: SlowQueue) -> None:
    """All that a device does for one chain."""
    await queue.disable_kicks()
    chain = await queue.take()
    assert chain is not None
    data = await queue.read(chain.readable, 10)
    await queue.put(chain.head, await queue.write(chain.writable, data))
    await queue.publish()
    await queue.should_interrupt()
    await queue.enable_kicks()


# --- buffers --------------------------------------------------------------------------------------


def test_one_chain_from_end_to_end() -> None:
    queue, memory = a_queue()
    finish(serve(queue))
    assert memory.data[BUFFERS + 10 : BUFFERS + 13] == b"012"
    assert memory.data[BUFFERS + 0x100 : BUFFERS + 0x105] == b"34567"
    assert memory.data[BUFFERS + 0x105] == 0
    assert RingDriver(SIZE, memory).used(0) == (0, 8)
    assert RingDriver(SIZE, memory).used_index == 1


def test_a_table_is_read_at_once() -> None:
    queue, memory = a_queue()
    chain = finish(queue.take())
    assert chain is not None
    assert memory.reads == 4  # the index, the entry, the descriptor, the table
    assert chain.readable == [Piece(BUFFERS, 10)]
    assert chain.writable == [Piece(BUFFERS + 10, 3), Piece(BUFFERS + 0x100, 5)]


sizes = st.lists(st.integers(0, 9), max_size=6)


def laid_out(piece_sizes: list[int]) -> list[Piece]:
    return [Piece(BUFFERS + 16 * n, size) for n, size in enumerate(piece_sizes)]


@given(sizes, st.integers(0, 60))
def test_reading_stops_at_the_limit(piece_sizes: list[int], limit: int) -> None:
    ring = SlowRing(SIZE)
    pieces = laid_out(piece_sizes)
    assert total(pieces) == sum(piece_sizes)
    everything = b""
    for number, piece in enumerate(pieces):
        part = bytes([number + 1]) * piece.size
        ring.memory.data[piece.iova : piece.iova + piece.size] = part
        everything += part
    assert finish(ring.queue.read(pieces, limit)) == everything[:limit]


@given(sizes, st.binary(max_size=60))
def test_writing_fills_the_pieces_in_order_and_nothing_else(
    piece_sizes: list[int], data: bytes
) -> None:
    ring = SlowRing(SIZE)
    pieces = laid_out(piece_sizes)
    assert finish(ring.queue.write(pieces, data)) == min(len(data), total(pieces))
    expected = bytearray(len(ring.memory.data))
    rest = data
    for piece in pieces:
        part, rest = rest[: piece.size], rest[piece.size :]
        expected[piece.iova : piece.iova + len(part)] = part
    assert ring.memory.data == expected


def test_a_buffer_outside_memory_is_the_drivers_fault() -> None:
    ring = SlowRing(SIZE)
    outside = [Piece(1 << 40, 4)]
    with pytest.raises(DriverError):
        finish(ring.queue.read(outside, 4))
    with pytest.raises(DriverError):
        finish(ring.queue.write(outside, b"1234"))
    assert finish(ring.queue.read(outside, 0)) == b""
    assert finish(ring.queue.read([Piece(1 << 40, 0)], 4)) == b""


# --- stopping -------------------------------------------------------------------------------------


def accesses_of_one_chain(*, event_idx: bool) -> int:
    queue, memory = a_queue(event_idx=event_idx)
    finish(serve(queue))
    return memory.accesses


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_queue_that_is_stopped_during_any_access_makes_no_other(event_idx: bool) -> None:
    number = accesses_of_one_chain(event_idx=event_idx)
    assert number == (12 if event_idx else 13)
    for fatal in range(number):
        queue, memory = a_queue(event_idx=event_idx)
        memory.fatal = fatal
        with pytest.raises(QueueStopped):
            finish(serve(queue))
        assert memory.accesses == fatal + 1


@pytest.mark.parametrize(
    "step",
    [
        SlowQueue.take,
        SlowQueue.publish,
        SlowQueue.disable_kicks,
        SlowQueue.enable_kicks,
        lambda queue: queue.put(0, 0),
        lambda queue: queue.read([Piece(BUFFERS, 1)], 1),
        lambda queue: queue.write([Piece(BUFFERS, 1)], b"1"),
    ],
)
def test_no_step_of_a_stopped_queue_touches_memory(
    step: Callable[[SlowQueue], Awaitable[object]],
) -> None:
    async def run() -> None:
        await step(queue)

    queue, memory = a_queue()
    queue.stop()
    before = bytes(memory.data)
    with pytest.raises(QueueStopped):
        finish(run())
    assert memory.accesses == 0
    assert bytes(memory.data) == before


def test_a_queue_that_finishes_takes_no_more_and_ends_what_it_took() -> None:
    queue, memory = a_queue()
    chain = finish(queue.take())
    assert chain is not None
    queue.finish()
    with pytest.raises(QueueStopped):
        finish(queue.take())
    finish(queue.put(chain.head, finish(queue.write(chain.writable, b"abcd"))))
    finish(queue.publish())
    assert RingDriver(SIZE, memory).used_index == queue.published == 1
    queue.go_on()
    assert finish(queue.take()) is None


def test_what_was_put_counts_once_it_is_published() -> None:
    queue, _ = a_queue()
    chain = finish(queue.take())
    assert chain is not None
    finish(queue.put(chain.head, 0))
    assert (queue.published, queue.next_used) == (0, 1)
    finish(queue.publish())
    assert queue.published == 1


def test_a_position_that_only_guest_memory_knows() -> None:
    queue, memory = a_queue()
    memory.view(USED + 2, 2)[:] = (0xFFFF).to_bytes(2, "little")
    memory.view(AVAIL + 2, 2)[:] = (0xFFFF).to_bytes(2, "little")
    queue.start_from_memory()
    before = queue.placed
    assert finish(queue.take()) is None
    assert (before, queue.placed) == (False, True)
    assert (queue.next_avail, queue.next_used, queue.signalled) == (0xFFFF, 0xFFFF, 0xFFFF)
    queue.start_from_memory()
    queue.start(3, 3)
    assert (queue.placed, queue.next_used) == (True, 3)


def test_it_goes_on_from_what_was_published_though_an_access_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lost(iova: int, data: bytes) -> None:
        raise ConnectionLost("no reply")

    queue, memory = a_queue()
    assert finish(queue.take()) is not None
    finish(queue.resume())
    assert (queue.next_avail, queue.next_used) == (0, 0)
    chain = finish(queue.take())
    assert chain is not None
    finish(queue.put(chain.head, 0))
    with monkeypatch.context() as out_of_reach:
        out_of_reach.setattr(memory, "write", lost)
        with pytest.raises(ConnectionLost):
            finish(queue.publish())
    assert RingDriver(SIZE, memory).used_index == 0
    finish(queue.resume())
    assert RingDriver(SIZE, memory).used_index == queue.next_avail == queue.next_used == 1
