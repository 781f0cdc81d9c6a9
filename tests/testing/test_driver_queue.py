"""The driver's half of a ring, against a device's half that is written out here in full."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfio_user_virtio.testing.driver_queue import DeviceBroke, DriverQueue, QueueFull, Segment
from vfio_user_virtio.testing.guest_ram import GuestRam

if TYPE_CHECKING:
    from collections.abc import Iterator

NEXT, WRITE, INDIRECT = 1, 2, 4


class TinyDevice:
    """What a device sees of a ring, read with struct from the addresses it was given."""

    def __init__(self, ram: GuestRam, queue: DriverQueue[int], *, event_idx: bool) -> None:
        self.ram, self.size, self.event_idx = ram, queue.size, event_idx
        ring = queue.ring
        self.desc = ram.view(ring.desc, 16 * self.size)
        self.avail = ram.view(ring.driver, 6 + 2 * self.size)
        self.used = ram.view(ring.device, 6 + 8 * self.size)
        self.taken = self.returned = 0
        self.heads: list[int] = []

    def available(self) -> int:
        return (self._avail(1) - self.taken) & 0xFFFF

    def take(self) -> tuple[list[Segment], list[Segment]]:
        head = self._avail(2 + self.taken % self.size)
        self.taken = (self.taken + 1) & 0xFFFF
        self.heads.append(head)
        readable: list[Segment] = []
        writable: list[Segment] = []
        table, index = self.desc, head
        for _ in range(100):
            address, length, flags, following = struct.unpack_from("<QIHH", table, 16 * index)
            if flags & INDIRECT:
                assert flags == INDIRECT
                assert table is self.desc
                table, index = self.ram.view(address, length), 0
                continue
            (writable if flags & WRITE else readable).append((address, length))
            if not flags & NEXT:
                return readable, writable
            index = following
        raise AssertionError("the chain has no end")

    def give(self, which: int, length: int) -> None:
        head = self.heads.pop(which)
        struct.pack_into("<II", self.used, 4 + 8 * (self.returned % self.size), head, length)
        self.returned = (self.returned + 1) & 0xFFFF
        struct.pack_into("<H", self.used, 2, self.returned)

    def want_kick_at(self, index: int) -> None:
        struct.pack_into("<H", self.used, 4 + 8 * self.size, index & 0xFFFF)

    def want_kicks(self, wanted: bool) -> None:
        struct.pack_into("<H", self.used, 0, 0 if wanted else 1)

    def interrupt_wanted(self, old: int) -> bool:
        if not self.event_idx:
            return not self._avail(0) & 1
        event = self._avail(2 + self.size)
        return (self.returned - event - 1) & 0xFFFF < (self.returned - old) & 0xFFFF

    def _avail(self, position: int) -> int:
        return int(struct.unpack_from("<H", self.avail, 2 * position)[0])


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(1 << 20) as ram:
        yield ram


def test_chains_go_into_descriptors(ram: GuestRam) -> None:
    queue: DriverQueue[int] = DriverQueue(ram, 8, indirect=False)
    device = TinyDevice(ram, queue, event_idx=True)
    queue.add(1, [(0x100, 10), (0x200, 20)], [(0x300, 30)])
    queue.add(2, [], [(0x400, 40)])
    assert queue.free_descriptors == 4
    assert device.available() == 0
    queue.publish()
    assert device.available() == 2
    assert device.take() == ([(0x100, 10), (0x200, 20)], [(0x300, 30)])
    assert device.take() == ([], [(0x400, 40)])


def test_a_long_buffer_goes_into_an_indirect_table(ram: GuestRam) -> None:
    queue: DriverQueue[int] = DriverQueue(ram, 2, indirect=True)
    device = TinyDevice(ram, queue, event_idx=True)
    segments = [(0x1000 * i, 100 + i) for i in range(1, 40)]
    queue.add(1, segments[:20], segments[20:])
    assert queue.free_descriptors == 1
    queue.publish()
    address, length, flags, _ = struct.unpack_from("<QIHH", device.desc, 0)
    assert (length, flags) == (39 * 16, INDIRECT)
    entries = list(struct.iter_unpack("<QIHH", ram.view(address, length)))
    assert [(entry[0], entry[1]) for entry in entries] == segments
    assert [entry[2] for entry in entries] == [NEXT] * 20 + [NEXT | WRITE] * 18 + [WRITE]
    assert [entry[3] for entry in entries[:-1]] == list(range(1, 39))
    assert device.take() == (segments[:20], segments[20:])


def test_a_full_queue_refuses_and_changes_nothing(ram: GuestRam) -> None:
    queue: DriverQueue[int] = DriverQueue(ram, 4, indirect=False)
    queue.add(1, [(0, 1)] * 3)
    with pytest.raises(QueueFull, match="2 descriptors are needed, 1 are free"):
        queue.add(2, [(0, 1)] * 2)
    with pytest.raises(ValueError, match="at least one segment"):
        queue.add(2)
    queue.add(2, [(0, 1)])
    assert queue.outstanding == 2


@pytest.mark.parametrize(
    ("head", "length", "index", "message"),
    [
        (3, 0, 1, "returns 3, which is not out"),
        (1 << 16, 0, 1, "which is not out"),
        (0, 101, 1, "101 bytes written to a buffer of 100"),
        (0, 0, 2, "only 1 buffers are outstanding"),
        (0, 0, 0xFFFF, "only 1 buffers are outstanding"),
    ],
)
def test_a_device_that_breaks_the_rules_is_found_out(
    ram: GuestRam, head: int, length: int, index: int, message: str
) -> None:
    queue: DriverQueue[int] = DriverQueue(ram, 4)
    assert queue.add(1, [], [(0, 100)]) == 0
    queue.publish()
    used = ram.view(queue.ring.device, 6 + 8 * 4)
    struct.pack_into("<HII", used, 2, index, head, length)
    with pytest.raises(DeviceBroke, match=message):
        queue.collect()


def test_used_buffers_come_in_the_devices_order_and_by_the_piece(ram: GuestRam) -> None:
    queue: DriverQueue[int] = DriverQueue(ram, 4)
    device = TinyDevice(ram, queue, event_idx=True)
    for token in (10, 11, 12):
        queue.add(token, [], [(0, 100)])
    queue.publish()
    for _ in range(3):
        device.take()
    device.give(2, 1)
    device.give(0, 2)
    device.give(0, 3)
    first = queue.collect(limit=2)
    assert [(used.token, used.length) for used in first] == [(12, 1), (10, 2)]
    assert [(used.token, used.length) for used in queue.collect()] == [(11, 3)]
    assert queue.collect() == []
    assert queue.free_descriptors == 4


def test_memory_is_given_back(ram: GuestRam) -> None:
    first = ram.allocate(64)
    ram.free(first)
    for _ in range(200):  # 1 MiB holds no more than about 20 of them at once
        queue: DriverQueue[int] = DriverQueue(ram, 1024)
        queue.add(1, [(0, 1)] * 100)
        queue.close()


def test_raw_ring_writes_what_it_is_told(ram: GuestRam) -> None:
    ring = DriverQueue[int](ram, 4).ring
    ring.set_descriptor(3, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, 0xFFFF, 0xFFFF)
    assert bytes(ram.view(ring.desc + 48, 16)) == b"\xff" * 16
    ring.avail_flags, ring.avail_idx, ring.used_event = 1, 2, 3
    ring.set_avail(6, 0x1234)
    assert bytes(ram.view(ring.driver, 14)).hex() == "01000200" + "0000" * 2 + "3412" + "00000300"
    assert (ring.avail_flags, ring.avail_idx, ring.used_event) == (1, 2, 3)
    ram.view(ring.device, 38)[:4] = b"\1\0\5\0"
    ram.view(ring.device + 36, 2)[:] = b"\7\0"
    assert (ring.used_flags, ring.used_idx, ring.avail_event) == (1, 5, 7)


class QueueModel(RuleBasedStateMachine):
    """Buffers go in, out of order they come back; notifications are neither lost nor ignored."""

    @initialize(
        size=st.sampled_from([2, 4, 16]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        start=st.sampled_from([0, 0xFFFD]),
    )
    def begin(self, size: int, event_idx: bool, indirect: bool, start: int) -> None:
        self.ram = GuestRam(1 << 20)
        self.indirect = indirect
        self.queue: DriverQueue[int] = DriverQueue(
            self.ram, size, event_idx=event_idx, indirect=indirect
        )
        self.device = TinyDevice(self.ram, self.queue, event_idx=event_idx)
        self.next_token = 0
        self.added: list[tuple[int, list[Segment], list[Segment]]] = []
        self.published = 0
        self.taken: list[tuple[int, int]] = []
        self.given: list[tuple[int, int]] = []
        self.queue._avail = self.queue._published = self.queue._used = start
        self.queue.ring.avail_idx = self.device.taken = self.device.returned = start
        struct.pack_into("<H", self.device.used, 2, start)
        self.device.want_kick_at(start)

    @rule(readable=st.integers(0, 3), writable=st.integers(0, 3))
    def add(self, readable: int, writable: int) -> None:
        if readable + writable == 0:
            return
        token = self.next_token
        segments = [(self.ram.iova + 64 * i + token, i + 1) for i in range(readable + writable)]
        needed = 1 if self.indirect else len(segments)
        if needed > self.queue.free_descriptors:
            with pytest.raises(QueueFull):
                self.queue.add(token, segments[:readable], segments[readable:])
            return
        self.queue.add(token, segments[:readable], segments[readable:])
        self.added.append((token, segments[:readable], segments[readable:]))
        self.next_token += 1

    @rule()
    def publish(self) -> None:
        fresh = len(self.added) - self.published
        waiting = self.device.available()
        kick = self.queue.publish()
        self.published = len(self.added)
        assert self.device.available() == waiting + fresh
        if not fresh:
            assert not kick
        elif not self.device.event_idx or waiting == 0:
            # The device asked for a kick at the first entry it has not taken.
            assert kick

    @precondition(lambda self: self.published)
    @rule()
    def take(self) -> None:
        token, readable, writable = self.added.pop(0)
        self.published -= 1
        assert self.device.take() == (readable, writable)
        self.device.want_kick_at(self.device.taken)
        self.taken.append((token, sum(length for _, length in writable)))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), armed=st.booleans())
    def give(self, data: st.DataObject, armed: bool) -> None:
        before = self.device.returned
        if armed:
            assert self.queue.enable_interrupts() is (not self.given)
        else:
            self.queue.disable_interrupts()
        which = data.draw(st.integers(0, len(self.taken) - 1))
        token, room = self.taken.pop(which)
        self.device.give(which, room)
        if not self.given:
            assert self.device.interrupt_wanted(before) is armed
        self.given.append((token, room))

    @precondition(lambda self: self.given)
    @rule(limit=st.none() | st.integers(0, 3))
    def collect(self, limit: int | None) -> None:
        found = [(used.token, used.length) for used in self.queue.collect(limit)]
        assert found == self.given[:limit]
        del self.given[: len(found)]

    @invariant()
    def every_buffer_is_somewhere(self) -> None:
        if not hasattr(self, "queue"):
            return
        out = len(self.added) + len(self.taken) + len(self.given)
        assert self.queue.outstanding == out
        if self.indirect:
            assert self.queue.free_descriptors == self.queue.size - out

    def teardown(self) -> None:
        if hasattr(self, "ram"):
            self.ram.close()


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
