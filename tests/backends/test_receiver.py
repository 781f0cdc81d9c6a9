"""Delivery into a ring: room, merging, spilling, holding; virtio 1.4, Processing of Incoming
Packets.  The uplink's part is played by a readv from a memfd."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio.rings import AVAIL, BUFFERS, DESC, NEXT, USED, WRITE, FastRing
from vfio_user_virtio.backends.software.receiver import LARGEST, Receiver

pytestmark = pytest.mark.usefixtures("engine")

SIZE = 8
IOV_MAX = 1024


class Driver:
    """Posts buffers of the given sizes, one chain each, end to end from BUFFERS on."""

    def __init__(self, *, mergeable: bool, memory_size: int = 1 << 20) -> None:
        self.ring = FastRing(SIZE, memory_size=memory_size)
        self.receiver = Receiver(self.ring.queue, mergeable=mergeable)
        self._next_buffer = BUFFERS
        self._posted: list[list[tuple[int, int]]] = []
        self._seen = 0

    def post(self, *pieces: int, table: int = 0) -> None:
        """One chain of writable pieces; through an indirect table at `table` if given."""
        head = len(self._posted) % SIZE
        data = self.ring.memory.data
        chain: list[tuple[int, int]] = []
        entries = b""
        for index, size in enumerate(pieces):
            flags = WRITE | (NEXT if index + 1 < len(pieces) else 0)
            entries += struct.pack("<QIHH", self._next_buffer, size, flags, index + 1)
            chain.append((self._next_buffer, size))
            self._next_buffer += size
        if table:
            data[table : table + len(entries)] = entries
            entries = struct.pack("<QIHH", table, len(entries), 4, 0)
        assert len(entries) == 16
        data[DESC + 16 * head : DESC + 16 * head + 16] = entries
        struct.pack_into("<H", data, AVAIL + 4 + 2 * head, head)
        self._posted.append(chain)
        struct.pack_into("<H", data, AVAIL + 2, len(self._posted) & 0xFFFF)

    def received(self) -> list[bytes]:
        """The frames that came since the last call, put together by num_buffers."""
        data = self.ring.memory.data
        (used,) = struct.unpack_from("<H", data, USED + 2)
        frames: list[bytes] = []
        while self._seen != used:
            frame, missing = b"", 1
            while missing:
                at = USED + 4 + 8 * (self._seen % SIZE)
                head, length = struct.unpack_from("<II", data, at)
                rest = length
                for address, size in self._posted[head]:
                    frame += data[address : address + min(size, rest)]
                    rest -= min(size, rest)
                if missing == 1 and len(frame) == length:
                    (missing,) = struct.unpack_from("<H", frame, 10)
                missing -= 1
                self._seen += 1
            frames.append(frame)
        return frames


def frame_of(size: int) -> bytes:
    return bytes(12) + bytes(i * 7 & 0xFF for i in range(size - 12))


def expected(frame: bytes, buffers: int) -> bytes:
    return frame[:10] + buffers.to_bytes(2, "little") + frame[12:]


def read_in(receiver: Receiver, frame: bytes) -> bool:
    """What an uplink does: one readv into the reserved room, then commit."""
    room = receiver.reserve()
    if room is None:
        return False
    fd = os.memfd_create("frame")
    try:
        os.write(fd, frame)
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.readv(fd, room) == len(frame)
    finally:
        os.close(fd)
    receiver.commit(len(frame))
    return True


@pytest.mark.parametrize("mergeable", [False, True])
def test_a_frame_fills_one_buffer(*, mergeable: bool) -> None:
    driver = Driver(mergeable=mergeable)
    driver.post(2000)
    frame = frame_of(100)
    assert read_in(driver.receiver, frame)
    assert driver.received() == [expected(frame, 1)]
    assert driver.receiver.reserve() is None


def test_a_frame_is_merged_from_several_buffers() -> None:
    driver = Driver(mergeable=True)
    for _ in range(4):
        driver.post(100)
    frame = frame_of(350)
    assert driver.receiver.deliver((frame[:30], frame[30:]), len(frame))
    assert driver.received() == [expected(frame, 4)]


def test_a_frame_that_fits_no_buffer_is_dropped_without_merging() -> None:
    driver = Driver(mergeable=False)
    driver.post(100)
    assert read_in(driver.receiver, frame_of(200))
    assert driver.receiver.deliver((frame_of(200),), 200)
    assert driver.receiver.too_long == 2
    assert read_in(driver.receiver, frame_of(100))
    assert driver.received() == [expected(frame_of(100), 1)]


def test_what_spills_is_held_until_there_is_room() -> None:
    driver = Driver(mergeable=True)
    driver.post(100)
    frame = frame_of(150)
    assert read_in(driver.receiver, frame)
    assert driver.received() == []
    assert driver.receiver.reserve() is None
    assert not driver.receiver.deliver((frame_of(60),), 60)
    driver.post(100)
    assert driver.receiver.reserve() is None
    driver.post(100)
    assert driver.receiver.deliver((frame_of(60),), 60)
    assert driver.received() == [expected(frame, 2), expected(frame_of(60), 1)]


def test_a_frame_larger_than_the_whole_ring_is_dropped() -> None:
    driver = Driver(mergeable=True)
    for _ in range(SIZE):
        driver.post(20)
    frame = frame_of(SIZE * 20 + 1)
    assert driver.receiver.deliver((frame,), len(frame))
    assert driver.receiver.too_long == 1
    assert driver.received() == []


@pytest.mark.parametrize("mergeable", [False, True])
def test_room_is_never_in_more_pieces_than_readv_takes(*, mergeable: bool) -> None:
    driver = Driver(mergeable=mergeable)
    for index in range(SIZE):
        driver.post(*[1] * IOV_MAX, table=0x8_0000 + index * 0x4000)
    room = driver.receiver.reserve()
    assert room is not None
    assert len(room) <= IOV_MAX
    frame = frame_of(1500)
    assert read_in(driver.receiver, frame)
    if mergeable:
        assert driver.received() == [expected(frame, 2)]
    else:
        assert driver.receiver.too_long == 1
    assert read_in(driver.receiver, frame_of(1000))
    assert driver.received() == [expected(frame_of(1000), 1)]


def test_taken_buffers_can_be_given_back() -> None:
    driver = Driver(mergeable=True)
    for _ in range(3):
        driver.post(100)
    assert driver.receiver.reserve() is not None
    assert driver.ring.position == (3, 0)
    driver.receiver.forget()
    assert driver.ring.position == (0, 0)
    assert read_in(driver.receiver, frame_of(100))
    assert driver.received() == [expected(frame_of(100), 1)]


def test_peek_and_reserved_show_what_was_read() -> None:
    driver = Driver(mergeable=True)
    driver.post(20)
    driver.post(100)
    room = driver.receiver.reserve()
    assert room is not None
    frame = frame_of(90)
    room[0][:] = frame[:20]
    room[1][:70] = frame[20:]
    assert driver.receiver.peek(12) == frame[:12]
    assert driver.receiver.peek(30) == frame[:30]
    assert driver.receiver.reserved(90) == (frame,)


@settings(max_examples=200)
@given(st.data())
def test_any_frames_through_any_buffers_arrive_in_order(data: st.DataObject) -> None:
    mergeable = data.draw(st.booleans())
    driver = Driver(mergeable=mergeable)
    waiting: list[bytes] = []
    arrived: list[bytes] = []
    posted = 0
    for _ in range(data.draw(st.integers(1, 12))):
        if posted < SIZE and data.draw(st.booleans()):
            driver.post(data.draw(st.integers(12, 300)) if mergeable else 300)
            posted += 1
            continue
        frame = frame_of(data.draw(st.integers(26, 300)))
        if data.draw(st.booleans()):
            taken = read_in(driver.receiver, frame)
        else:
            taken = driver.receiver.deliver((frame[:26], frame[26:]), len(frame))
        if taken:
            waiting.append(frame)
        arrived += driver.received()
    assert len(arrived) <= len(waiting)
    for frame, came in zip(waiting, arrived, strict=False):
        assert came[:10] + came[12:] == frame[:10] + frame[12:]
    if driver.receiver.too_long == 0 and mergeable:
        assert len(waiting) - len(arrived) <= 1


def test_the_largest_frame_fits_a_ring_of_pages() -> None:
    driver = Driver(mergeable=True)
    for _ in range(SIZE):
        driver.post(10_000)
    frame = frame_of(LARGEST)
    assert read_in(driver.receiver, frame)
    assert driver.received() == [expected(frame, 7)]
