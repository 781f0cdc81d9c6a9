"""Both queues on the same memory: with any lawful driver they take the same chains, leave the same
bytes and come to the same decisions, and those are the ones a model expects.

What they do with unlawful ones is the business of tests/fuzz/fuzz_rings.py.
"""

from __future__ import annotations

import struct
from typing import Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.virtio.rings import (
    BUFFERS,
    DESC,
    INDIRECT,
    NEXT,
    TABLES,
    USED,
    WRITE,
    Descriptor,
    FastRing,
    RingDriver,
    SlowRing,
    Taken,
)
from vfio_user_virtio.virtio.slow_queue import Piece

WRAP: Final = 1 << 16
MAX_BUFFERS: Final = 6

buffers = st.lists(st.tuples(st.integers(1, 64), st.booleans()), min_size=1, max_size=MAX_BUFFERS)


class AnyLawfulDriver(RuleBasedStateMachine):
    """A driver that keeps the rules, a device that does things in any order it may."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 16]),
        event_idx=st.booleans(),
        start=st.sampled_from([0, 0x7FFF, WRAP - 3, WRAP - 1]) | st.integers(0, WRAP - 1),
    )
    def begin(self, size: int, event_idx: bool, start: int) -> None:
        self.size = size
        self.event_idx = event_idx
        self.fast = FastRing(size, event_idx=event_idx)
        self.slow = SlowRing(size, event_idx=event_idx)
        self.rings = (self.fast, self.slow)
        self.driver = RingDriver(size, self.fast.memory, self.slow.memory)
        self.driver.start(start)
        for ring in self.rings:
            ring.start(start, start)
            ring.publish()
        self.free = list(range(size))
        self.owned: dict[int, list[int]] = {}  # head: the descriptors of its chain
        self.entered: list[Taken] = []  # filled, not yet to be seen
        self.waiting: list[Taken] = []  # to be seen, not taken
        self.taken: dict[int, Taken] = {}  # by position in the available ring, if not yet put
        self.position = 0  # chains taken so far
        self.put: list[tuple[int, int]] = []  # put, not yet published
        self.published: list[tuple[int, int]] = []  # published, not yet seen by the driver
        self.used = start  # as far as the driver has seen
        self.signalled = start
        self.next_used = start
        self.used_event = 0
        self.no_interrupt = False
        self.kicks_off = False
        self.avail_event: int | None = None

    # the driver

    @rule(
        parts=buffers,
        shape=st.sampled_from(["direct", "indirect", "mixed"]),
        place=st.integers(0, 255),
    )
    def add(self, parts: list[tuple[int, bool]], shape: str, place: int) -> None:
        """Build a chain and enter it, if there are descriptors for it."""
        parts.sort(key=lambda part: part[1])
        direct = {"direct": len(parts), "indirect": 0, "mixed": len(parts) // 2}[shape]
        needed = direct + (direct < len(parts))
        if needed > len(self.free):
            return
        indices = [self.free.pop(place % len(self.free)) for _ in range(needed)]
        head = indices[0]
        pieces = [Piece(BUFFERS + 512 * head + 64 * n, size) for n, (size, _) in enumerate(parts)]
        flags = [WRITE if write else 0 for _, write in parts]
        chain = [
            Descriptor(*piece, flag) for piece, flag in zip(pieces[:direct], flags, strict=False)
        ]
        if direct < len(parts):
            chain.append(self._table(head, pieces[direct:], flags[direct:], place))
        for n, descriptor in enumerate(chain):
            if n + 1 < needed:
                descriptor = descriptor._replace(flags=descriptor.flags | NEXT, next=indices[n + 1])
            self.driver.write_table(DESC + 16 * indices[n], [descriptor])
        self.owned[head] = indices
        self.driver.enter(head)
        split = flags.count(0)
        self.entered.append(Taken(head, pieces[:split], pieces[split:]))

    def _table(self, head: int, pieces: list[Piece], flags: list[int], place: int) -> Descriptor:
        """A table of `pieces`, its first entry in place and the others turned by `place`."""
        count = len(pieces)
        slots = [0] + [1 + (n + place) % (count - 1) for n in range(count - 1)]
        table = [Descriptor(0, 0)] * count
        for n in range(count):
            chained = n + 1 < count
            table[slots[n]] = Descriptor(
                *pieces[n], flags[n] | (NEXT if chained else 0), slots[n + 1] if chained else 0
            )
        address = TABLES + 0x200 * head
        self.driver.write_table(address, table)
        return Descriptor(address, 16 * count, INDIRECT | (WRITE if place & 1 else 0))

    @rule()
    def publish_available(self) -> None:
        self.driver.publish(self.driver.available)
        self.waiting += self.entered
        self.entered.clear()

    @rule(ahead=st.integers(-2, 3))
    def wish_for_an_interrupt(self, ahead: int) -> None:
        self.used_event = (self.used + ahead) % WRAP
        self.driver.set_used_event(self.used_event)

    @rule(on=st.booleans())
    def ask_for_silence(self, on: bool) -> None:
        self.no_interrupt = on
        self.driver.set_no_interrupt(on=on)

    @rule()
    def collect_used(self) -> None:
        assert self.driver.used_index == (self.used + len(self.published)) % WRAP
        for head, written in self.published:
            assert self.driver.used(self.used) == (head, written)
            self.used = (self.used + 1) % WRAP
            self.free += self.owned.pop(head)
        self.published.clear()

    # the device

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        for _ in range(count):
            expected = self.waiting.pop(0) if self.waiting else None
            assert [ring.take() for ring in self.rings] == [expected, expected]
            if expected is not None:
                self.taken[self.position] = expected
                self.position += 1

    @rule(count=st.integers(1, 5))
    def give_back(self, count: int) -> None:
        """Give back up to `count` chains, as far as none of them has been put."""
        given = 0
        while given < count and self.position - 1 in self.taken:
            self.position -= 1
            self.waiting.insert(0, self.taken.pop(self.position))
            given += 1
        for ring in self.rings:
            ring.give_back(given)

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, 15), written=st.sampled_from([0, 1, 1526, 0xFFFF_FFFF]))
    def finish_one(self, which: int, written: int) -> None:
        head = self.taken.pop(list(self.taken)[which % len(self.taken)]).head
        for ring in self.rings:
            ring.put(head, written)
        self.put.append((head, written))
        self.next_used = (self.next_used + 1) % WRAP

    @rule()
    def publish_used(self) -> None:
        for ring in self.rings:
            ring.publish()
        self.published += self.put
        self.put.clear()

    @rule()
    def decide_on_an_interrupt(self) -> None:
        self.publish_used()
        new = (self.next_used - self.signalled) % WRAP
        passed = [(self.signalled + n) % WRAP for n in range(new)]
        wanted = self.used_event in passed if self.event_idx else not self.no_interrupt
        expected = bool(new) and wanted
        assert [ring.should_interrupt() for ring in self.rings] == [expected, expected]
        self.signalled = self.next_used

    @rule()
    def disable_kicks(self) -> None:
        for ring in self.rings:
            ring.disable_kicks()
        self.kicks_off = not self.event_idx

    @rule()
    def enable_kicks(self) -> None:
        nothing = not self.waiting
        assert [ring.enable_kicks() for ring in self.rings] == [nothing, nothing]
        self.kicks_off = False
        if self.event_idx:
            self.avail_event = self.fast.position[0]

    # always

    @invariant()
    def both_stand_where_they_should(self) -> None:
        entered = len(self.entered) + len(self.waiting)
        next_avail = (self.driver.available - entered) % WRAP
        expected = (next_avail, self.next_used)
        assert [ring.position for ring in self.rings] == [expected, expected]

    @invariant()
    def both_left_the_same_bytes(self) -> None:
        assert self.fast.memory.data == self.slow.memory.data
        assert self.driver.used_flags == int(self.kicks_off)
        assert self.driver.avail_event == (self.avail_event or 0)
        seen = self.driver.used_index
        assert seen == (self.next_used - len(self.put)) % WRAP


TestAnyLawfulDriver = AnyLawfulDriver.TestCase


def test_the_used_ring_lies_where_the_model_says() -> None:
    ring = FastRing(8)
    ring.put(3, 9)
    ring.publish()
    assert ring.memory.data[USED : USED + 12] == struct.pack("<HHII", 0, 1, 3, 9)
