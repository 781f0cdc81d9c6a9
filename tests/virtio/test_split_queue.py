"""Split rings: what both queues do alike, then what only the mapped one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.virtio.rings import (
    AVAIL,
    BUFFERS,
    DESC,
    INDIRECT,
    MEMORY_SIZE,
    NEXT,
    TABLES,
    USED,
    WRITE,
    Descriptor,
    FastRing,
    Ring,
    RingDriver,
    RingMemory,
    SlowRing,
    Taken,
)
from vfio_user_virtio import limits
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.virtio.slow_queue import Piece
from vfio_user_virtio.virtio.split_queue import (
    DESCRIPTOR,
    RingLayout,
    SplitQueue,
    check_alignment_untrusted,
    ring_layout,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    MakeRing = Callable[..., Ring]

SIZE: Final = 8
U32_MAX: Final = 0xFFFF_FFFF


@pytest.fixture(params=[FastRing, SlowRing])
def make(request: pytest.FixtureRequest) -> MakeRing:
    kind: type[Ring] = request.param
    return kind


def ring_with(
    make: MakeRing,
    *descriptors: Descriptor,
    indirect: bool = True,
    memory_size: int = MEMORY_SIZE,
) -> Ring:
    """A ring whose table starts with `descriptors`, of which the first is available."""
    ring = make(SIZE, indirect=indirect, memory_size=memory_size)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, descriptors)
    driver.offer(0)
    return ring


def ring_with_table(
    make: MakeRing,
    table: Sequence[Descriptor],
    *,
    length: int | None = None,
    flags: int = INDIRECT,
    indirect: bool = True,
) -> Ring:
    """A ring with one chain, in an indirect table."""
    length = 16 * len(table) if length is None else length
    ring = ring_with(make, Descriptor(TABLES, length, flags), indirect=indirect)
    RingDriver(SIZE, ring.memory).write_table(TABLES, table)
    return ring


A: Final = Piece(BUFFERS, 100)
B: Final = Piece(BUFFERS + 0x1000, 200)
C: Final = Piece(BUFFERS + 0x2000, 300)


# --- chains ---------------------------------------------------------------------------------------


def test_an_empty_ring_has_nothing(make: MakeRing) -> None:
    ring = make(SIZE)
    assert ring.take() is None
    assert ring.position == (0, 0)


@pytest.mark.parametrize("size", [1, 2, SIZE, limits.MAX_QUEUE_SIZE])
def test_single_descriptors_of_a_full_ring_in_the_order_of_the_available_ring(
    make: MakeRing, size: int
) -> None:
    ring = make(size)
    driver = RingDriver(size, ring.memory)
    for index in range(size):
        flags = WRITE if index % 2 else 0
        driver.write_table(DESC + 16 * index, [Descriptor(BUFFERS + index, 1 + index, flags)])
    driver.offer(*reversed(range(size)))
    for index in reversed(range(size)):
        piece = [Piece(BUFFERS + index, 1 + index)]
        assert ring.take() == (Taken(index, [], piece) if index % 2 else Taken(index, piece, []))
    assert ring.take() is None
    assert ring.position == (size & 0xFFFF, 0)


def test_a_chain_of_several(make: MakeRing) -> None:
    ring = ring_with(
        make,
        Descriptor(*A, NEXT, 5),
        Descriptor(*C, WRITE, 77),
        *[Descriptor(0, 0)] * 3,
        Descriptor(*B, NEXT | WRITE, 1),
    )
    assert ring.take() == Taken(0, [A], [B, C])


def test_a_chain_in_a_table_follows_next_in_the_table(make: MakeRing) -> None:
    table = [
        Descriptor(*A, NEXT, 3),
        Descriptor(*C, WRITE),
        Descriptor(1 << 63, 1, WRITE),
        Descriptor(*B, NEXT, 1),
    ]
    assert ring_with_table(make, table).take() == Taken(0, [A, B], [C])


def test_write_on_the_indirect_descriptor_means_nothing(make: MakeRing) -> None:
    ring = ring_with_table(make, [Descriptor(*A)], flags=INDIRECT | WRITE)
    assert ring.take() == Taken(0, [A], [])


def test_a_chain_may_end_in_a_table(make: MakeRing) -> None:
    ring = ring_with(make, Descriptor(*A, NEXT, 1), Descriptor(TABLES, 32, INDIRECT))
    table = [Descriptor(*B, NEXT, 1), Descriptor(*C, WRITE)]
    RingDriver(SIZE, ring.memory).write_table(TABLES, table)
    assert ring.take() == Taken(0, [A, B], [C])


def test_buffers_of_no_bytes_are_buffers(make: MakeRing) -> None:
    assert ring_with(make, Descriptor(1 << 63, 0, WRITE)).take() == Taken(0, [], [])
    ring = ring_with(make, Descriptor(*A, NEXT, 1), Descriptor(0, 0, NEXT, 2), Descriptor(*B))
    assert ring.take() == Taken(0, [A, B], [])


@pytest.mark.parametrize("flags", [0, WRITE])
def test_of_absurd_lengths_the_beginning_is_seen(make: MakeRing, flags: int) -> None:
    seen = [Piece(0, limits.MAX_DESCRIPTOR_LENGTH)]
    expected = Taken(0, [], seen) if flags else Taken(0, seen, [])
    for chained in (0, NEXT):
        ring = ring_with(
            make,
            Descriptor(0, U32_MAX, flags | chained, 1),
            Descriptor(0, 0, flags),
            memory_size=limits.MAX_DESCRIPTOR_LENGTH,
        )
        assert ring.take() == expected


def test_the_longest_chain_is_one_table_of_the_most_descriptors(make: MakeRing) -> None:
    most = limits.MAX_CHAIN_DESCRIPTORS
    table = [Descriptor(BUFFERS + n, 1, NEXT, n + 1) for n in range(most - 1)]
    ring = ring_with_table(make, [*table, Descriptor(BUFFERS, 1)])
    taken = ring.take()
    assert taken is not None
    assert len(taken.readable) == most
    ring = ring_with_table(make, [*table, Descriptor(BUFFERS, 1), Descriptor(BUFFERS, 1)])
    with pytest.raises(DriverError, match="an indirect table of 16400 bytes"):
        ring.take()


# --- hostile chains -------------------------------------------------------------------------------


def test_a_head_outside_the_table(make: MakeRing) -> None:
    for head in (SIZE, 0xFFFF):
        ring = make(SIZE)
        RingDriver(SIZE, ring.memory).offer(head)
        with pytest.raises(DriverError, match=f"descriptor {head} does not exist"):
            ring.take()


@pytest.mark.parametrize("target", [SIZE, SIZE + 1, 0xFFFF])
def test_next_outside_the_table(make: MakeRing, target: int) -> None:
    with pytest.raises(DriverError, match=f"descriptor {target} does not exist"):
        ring_with(make, Descriptor(*A, NEXT, target)).take()


@pytest.mark.parametrize("target", [2, SIZE - 1, 0xFFFF])
def test_next_outside_an_indirect_table(make: MakeRing, target: int) -> None:
    table = [Descriptor(*A, NEXT, target), Descriptor(*A)]
    with pytest.raises(DriverError, match=f"descriptor {target} does not exist in a table of 2"):
        ring_with_table(make, table).take()


@pytest.mark.parametrize("flags", [0, WRITE])
def test_loops(make: MakeRing, flags: int) -> None:
    alone = Descriptor(*A, NEXT | flags, 0)
    pair = [Descriptor(*A, NEXT | flags, 1), Descriptor(*B, NEXT | flags, 0)]
    rings = [
        ring_with(make, alone),
        ring_with(make, *pair),
        ring_with_table(make, [alone]),
        ring_with_table(make, pair),
    ]
    for ring in rings:
        with pytest.raises(DriverError, match=r"more than 1024 .*is a loop"):
            ring.take()


def test_readable_after_writable(make: MakeRing) -> None:
    for length in (0, 1):
        table = [Descriptor(BUFFERS, length, WRITE | NEXT, 1), Descriptor(BUFFERS, length)]
        for ring in (ring_with(make, *table), ring_with_table(make, table)):
            with pytest.raises(DriverError, match="a readable descriptor follows a writable one"):
                ring.take()
    ring = ring_with(make, Descriptor(*A, WRITE | NEXT, 1), Descriptor(TABLES, 16, INDIRECT))
    RingDriver(SIZE, ring.memory).write_table(TABLES, [Descriptor(*B)])
    with pytest.raises(DriverError, match="a readable descriptor follows a writable one"):
        ring.take()


def test_indirect_that_was_not_negotiated(make: MakeRing) -> None:
    with pytest.raises(DriverError, match="an indirect descriptor without INDIRECT_DESC"):
        ring_with_table(make, [Descriptor(*A)], indirect=False).take()


def test_indirect_inside_indirect(make: MakeRing) -> None:
    with pytest.raises(DriverError, match="an indirect table holds an indirect descriptor"):
        ring_with_table(make, [Descriptor(TABLES, 16, INDIRECT)]).take()


def test_indirect_with_next(make: MakeRing) -> None:
    with pytest.raises(DriverError, match="an indirect descriptor has a next one"):
        ring_with_table(make, [Descriptor(*A)], flags=INDIRECT | NEXT).take()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 1024 + 16, U32_MAX, U32_MAX - 15])
def test_a_table_of_absurd_length(make: MakeRing, length: int) -> None:
    with pytest.raises(DriverError, match=f"an indirect table of {length} bytes"):
        ring_with_table(make, [Descriptor(*A)], length=length).take()


@pytest.mark.parametrize("address", [1 << 40, (1 << 64) - 16, (1 << 64) - 8])
def test_a_table_outside_memory(make: MakeRing, address: int) -> None:
    with pytest.raises(DriverError, match="no memory"):
        ring_with(make, Descriptor(address, 32, INDIRECT)).take()


@pytest.mark.parametrize("jump", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps(make: MakeRing, jump: int) -> None:
    for start in (0, 0xFFFC):
        ring = make(SIZE)
        ring.start(start, start)
        RingDriver(SIZE, ring.memory).publish((start + jump) & 0xFFFF)
        with pytest.raises(DriverError, match=f"{jump} entries ahead of {start}, in a ring of 8"):
            ring.take()


def test_more_available_than_the_ring_holds_while_chains_are_in_use(make: MakeRing) -> None:
    ring = make(SIZE)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, [Descriptor(*A)] * SIZE)
    driver.offer(*range(SIZE))
    for _ in range(SIZE):
        assert ring.take() is not None
    driver.offer(0)
    with pytest.raises(DriverError, match="1 entries ahead of 8, in a ring of 8 of which 8 are in"):
        ring.take()
    ring.put(0, 0)
    assert ring.take() == Taken(0, [A], [])


def test_a_broken_chain_takes_nothing(make: MakeRing) -> None:
    ring = ring_with(make, Descriptor(*A, NEXT, SIZE))
    for _ in range(2):
        with pytest.raises(DriverError):
            ring.take()
        assert ring.position == (0, 0)
    RingDriver(SIZE, ring.memory).write_table(DESC, [Descriptor(*A)])
    assert ring.take() == Taken(0, [A], [])


# --- giving back and putting ----------------------------------------------------------------------


def test_what_is_given_back_is_taken_again(make: MakeRing) -> None:
    for start in (0, 0xFFFF):
        ring = make(SIZE)
        driver = RingDriver(SIZE, ring.memory)
        driver.write_table(DESC, [Descriptor(*A), Descriptor(*B), Descriptor(*C)])
        driver.start(start)
        ring.start(start, start)
        driver.offer(0, 1, 2)
        taken = [ring.take() for _ in range(3)]
        ring.give_back()
        assert ring.take() == taken[2]
        ring.give_back(3)
        assert ring.position == (start, start)
        assert [ring.take() for _ in range(3)] == taken
        assert ring.take() is None


def test_used_entries_are_seen_when_published(make: MakeRing) -> None:
    ring = make(SIZE)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, [Descriptor(*A)] * SIZE)
    driver.start(0xFFFE)
    ring.start(0xFFFE, 0xFFFE)
    ring.publish()
    driver.offer(0, 1, 2)
    for _ in range(3):
        ring.take()
    ring.put(2, 0)
    ring.put(0, U32_MAX)
    ring.put(1, 7)
    assert driver.used_index == 0xFFFE
    assert [driver.used(index) for index in (0xFFFE, 0xFFFF, 0)] == [(2, 0), (0, U32_MAX), (1, 7)]
    ring.publish()
    assert driver.used_index == 1
    assert ring.position == (1, 1)
    assert driver.peek(USED + 4 + 8 * SIZE, 2) == b"\0\0"


# --- notifications --------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_new_is_no_interrupt(make: MakeRing, event_idx: bool) -> None:
    ring = make(SIZE, event_idx=event_idx)
    assert not ring.should_interrupt()
    ring.put(0, 0)
    assert ring.should_interrupt()
    assert not ring.should_interrupt()


def test_without_event_index_the_flag_decides(make: MakeRing) -> None:
    ring = make(SIZE)
    driver = RingDriver(SIZE, ring.memory)
    driver.set_used_event(5)
    driver.set_no_interrupt(on=True)
    ring.put(0, 0)
    assert not ring.should_interrupt()
    driver.set_no_interrupt(on=False)
    assert not ring.should_interrupt()
    ring.put(0, 0)
    assert ring.should_interrupt()


@pytest.mark.parametrize("start", [0, 0xFFFD])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_with_event_index_an_interrupt_comes_when_it_is_passed(
    make: MakeRing, start: int, batch: int
) -> None:
    for event in range(-3, batch + 3):
        ring = make(SIZE, event_idx=True)
        driver = RingDriver(SIZE, ring.memory)
        ring.start(start, start)
        driver.set_used_event((start + event) & 0xFFFF)
        driver.set_no_interrupt(on=True)
        for _ in range(batch):
            ring.put(0, 0)
        assert ring.should_interrupt() == (0 <= event < batch)


def test_kicks_without_event_index(make: MakeRing) -> None:
    ring = ring_with(make, Descriptor(*A))
    driver = RingDriver(SIZE, ring.memory)
    ring.disable_kicks()
    assert driver.used_flags == 1
    assert not ring.enable_kicks()
    assert driver.used_flags == 0
    ring.take()
    assert ring.enable_kicks()
    assert driver.avail_event == 0


def test_kicks_with_event_index(make: MakeRing) -> None:
    ring = make(SIZE, event_idx=True)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, [Descriptor(*A)] * SIZE)
    driver.start(0xFFFE)
    ring.start(0xFFFE, 0xFFFE)
    assert ring.enable_kicks()
    assert driver.avail_event == 0xFFFE
    driver.offer(0, 1, 2)
    assert not ring.enable_kicks()
    for _ in range(3):
        ring.take()
    ring.disable_kicks()
    assert driver.used_flags == 0
    assert driver.avail_event == 0xFFFE
    assert ring.enable_kicks()
    assert driver.avail_event == 1


# --- the mapped queue only ------------------------------------------------------------------------


def test_looking_counts_what_waits_and_take_goes_by_the_last_look() -> None:
    ring = ring_with(FastRing, Descriptor(*A), Descriptor(*B))
    assert isinstance(ring, FastRing)
    driver = RingDriver(SIZE, ring.memory)
    driver.available = 1
    assert ring.queue.look() == 1
    driver.offer(1)
    assert ring.queue.look() == 2
    assert ring.take() is not None
    assert ring.queue.look() == 1


def test_a_table_that_lies_in_pieces_and_anywhere() -> None:
    memory = RingMemory()
    asked: list[tuple[int, int, bool]] = []

    def scattered(iova: int, size: int, write: bool) -> list[memoryview]:
        asked.append((iova, size, write))
        if iova != TABLES + 1:
            return memory.views_of(iova, size, write)
        return [memory.view(iova + at, min(7, size - at)) for at in range(0, size, 7)]

    queue = SplitQueue(
        SIZE,
        memory.view(DESC, 16 * SIZE),
        memory.view(AVAIL, 6 + 2 * SIZE),
        memory.view(USED, 6 + 8 * SIZE),
        views_of=scattered,
        event_idx=False,
        indirect=True,
    )
    driver = RingDriver(SIZE, memory)
    driver.write_table(DESC, [Descriptor(TABLES + 1, 32, INDIRECT)])
    driver.write_table(TABLES + 1, [Descriptor(*A, NEXT, 1), Descriptor(*B, WRITE)])
    driver.offer(0)
    chain = queue.take()
    assert chain is not None
    assert memory.pieces(chain.readable, writable=False) == [A]
    assert memory.pieces(chain.writable, writable=True) == [B]
    assert asked == [(TABLES + 1, 32, False), (*A, False), (*B, True)]


@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_chain_in_too_many_pieces(flags: int) -> None:
    memory = RingMemory()

    def shattered(iova: int, size: int, write: bool) -> list[memoryview]:
        return [memory.view(iova, 1)] * size

    queue = SplitQueue(
        SIZE,
        memory.view(DESC, 16 * SIZE),
        memory.view(AVAIL, 6 + 2 * SIZE),
        memory.view(USED, 6 + 8 * SIZE),
        views_of=shattered,
        event_idx=False,
        indirect=True,
    )
    driver = RingDriver(SIZE, memory)
    half = limits.MAX_CHAIN_PIECES // 2
    driver.write_table(
        DESC, [Descriptor(BUFFERS, half, NEXT | flags, 1), Descriptor(BUFFERS, half, flags)]
    )
    driver.offer(0, 0)
    chain = queue.take()
    assert chain is not None
    assert len(chain.writable if flags else chain.readable) == limits.MAX_CHAIN_PIECES
    driver.write_table(DESC + 16, [Descriptor(BUFFERS, half + 1, flags)])
    with pytest.raises(DriverError, match="more than 1024 pieces"):
        queue.take()


def test_layout() -> None:
    assert ring_layout(1) == RingLayout(16, 8, 14)
    assert ring_layout(256) == RingLayout(4096, 518, 2054)
    assert DESCRIPTOR.pack(1, 2, 3, 4) == Descriptor(1, 2, 3, 4).encode()


def test_alignment() -> None:
    check_alignment_untrusted(0x1000, 0x2002, 0x3004)
    for name, addresses in (
        ("queue_desc 0x1008 is not aligned to 16", (0x1008, 0x2002, 0x3004)),
        ("queue_driver 0x2001 is not aligned to 2", (0x1000, 0x2001, 0x3004)),
        ("queue_device 0x3002 is not aligned to 4", (0x1000, 0x2002, 0x3002)),
    ):
        with pytest.raises(DriverError, match=name):
            check_alignment_untrusted(*addresses)


def test_the_used_index_in_guest_memory() -> None:
    ring = FastRing(SIZE)
    ring.memory.view(USED + 2, 2)[:] = b"\x34\x12"
    assert ring.queue.used_idx == 0x1234
