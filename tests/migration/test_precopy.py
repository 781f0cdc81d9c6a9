"""The accounting of PRE_COPY, by the tables of the reference and against a plain byte string."""

from __future__ import annotations

import itertools
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfio_user_virtio.migration.precopy import PrecopyInfo, RateLimiter, SavingSession
from vfio_user_virtio.migration.stream import RECORD_HEADER_SIZE, StreamDecoder, encode_image

HEADER: Final = bytes(RECORD_HEADER_SIZE)
SIZE: Final = 100
"""What the device says an image takes; the images here take 90."""
IMAGE: Final = b"i" * 90
RECORD_SIZE: Final = 106


@pytest.mark.parametrize(
    ("checks", "allowed"),
    [
        ([0.0], [True]),
        ([0.0, 0.0], [True, False]),
        ([0.0, 0.5, 1.0, 1.0001], [True, False, False, True]),
        ([5.0, 5.9, 6.5, 7.4, 7.51], [True, False, True, False, True]),
        ([0.0, 100.0, 100.0, 100.9, 101.1], [True, True, False, False, True]),
    ],
)
def test_rate_limiter(checks: list[float], allowed: list[bool]) -> None:
    limiter = RateLimiter()
    assert [limiter.allow(now) for now in checks] == allowed


@given(st.lists(st.floats(0, 10), max_size=50).map(sorted))
def test_tokens_are_more_than_a_second_apart(checks: list[float]) -> None:
    limiter = RateLimiter()
    taken = [now for now in checks if limiter.allow(now)]
    assert all(later > earlier + 1.0 for earlier, later in itertools.pairwise(taken))
    assert taken[:1] == checks[:1]


def session(*, read: int, records: int = 1) -> SavingSession:
    """A session with so many records queued and so many bytes read."""
    saving = SavingSession()
    for _ in range(records):
        saving.queue(HEADER, IMAGE)
    assert len(saving.read(read)) == read
    return saving


@pytest.mark.parametrize(
    ("read", "records", "fresh", "initial", "dirty", "refresh"),
    [
        # the first record is unread, in part or whole: fresh is ignored
        (0, 1, 0, RECORD_SIZE, 0, False),
        (0, 1, SIZE, RECORD_SIZE, 0, False),
        (RECORD_SIZE - 1, 1, SIZE, 1, 0, False),
        (0, 2, SIZE, RECORD_SIZE, 0, False),
        # nothing unread: the metadata's size is dirty, and an image is to be queued
        (RECORD_SIZE, 1, SIZE, 0, SIZE, True),
        (3 * RECORD_SIZE, 3, SIZE, 0, SIZE, True),
        # nothing unread and no token: 0/0
        (RECORD_SIZE, 1, 0, 0, 0, False),
        # a backlog is dirty, with fresh on top, which is not read
        (RECORD_SIZE, 2, 0, 0, RECORD_SIZE, False),
        (RECORD_SIZE + 7, 2, 0, 0, RECORD_SIZE - 7, False),
        (RECORD_SIZE + 7, 2, SIZE, 0, RECORD_SIZE - 7 + SIZE, False),
    ],
)
def test_precopy_info(
    read: int, records: int, fresh: int, initial: int, dirty: int, refresh: bool
) -> None:
    saving = session(read=read, records=records)
    assert saving.info(fresh) == PrecopyInfo(initial, dirty)
    assert saving.needs_refresh(fresh) is refresh
    assert saving.backlog == records * RECORD_SIZE - read


class Device:
    """Answers precopy info as the module's head says, counting the commands."""

    def __init__(self) -> None:
        self.saving = session(read=0)
        self.sizes_asked = 0
        self.images_got = 0

    def info(self, now: float) -> tuple[int, int]:
        fresh = 0
        if self.saving.limiter.allow(now):
            self.sizes_asked += 1
            fresh = SIZE
        found = self.saving.info(fresh)
        if self.saving.needs_refresh(fresh):
            self.images_got += 1
            self.saving.queue(HEADER, IMAGE)
        return found.initial_bytes, found.dirty_bytes


def test_a_whole_pre_copy() -> None:
    device = Device()
    assert device.info(0.0) == (RECORD_SIZE, 0), "the first question already costs a token"
    assert (device.sizes_asked, device.images_got) == (1, 0)
    assert len(device.saving.read(1000)) == RECORD_SIZE
    assert device.info(0.5) == (0, 0), "within a second of the last token"
    assert device.info(1.0) == (0, 0)
    assert device.info(1.5) == (0, SIZE), "16 too few, 10 too many"
    assert (device.sizes_asked, device.images_got) == (2, 1)
    assert device.info(1.6) == (0, RECORD_SIZE)
    assert device.info(3.0) == (0, RECORD_SIZE + SIZE), "a token spent for nothing"
    assert (device.sizes_asked, device.images_got) == (3, 1)
    assert len(device.saving.read(1000)) == RECORD_SIZE
    assert device.info(4.0) == (0, 0)
    assert device.info(4.1) == (0, SIZE)
    assert device.images_got == 2


def test_a_client_that_never_asks_gets_the_first_and_the_final_image() -> None:
    saving = SavingSession()
    stream = b""
    for image in (b"first", b"final"):
        saving.queue(encode_image(image))
        stream += saving.read(1000)
        assert saving.read(1000) == b"", "no more now, or at the end"
    decoder = StreamDecoder()
    assert [record.payload for record in decoder.feed_untrusted(stream)] == [b"first", b"final"]
    decoder.finish_untrusted()


def test_leftovers_come_before_the_final_record() -> None:
    saving = SavingSession()
    saving.queue(b"head", b"initial")
    assert saving.read(6) == b"headin"
    saving.queue(b"HEAD", b"final")
    assert saving.read(7) == b"itialHE"
    assert saving.info(0) == PrecopyInfo(0, 7)
    assert saving.read(0) == b""
    assert saving.read(100) == b"ADfinal"
    assert saving.read(100) == b""
    assert saving.backlog == 0


def test_an_empty_piece_is_nothing() -> None:
    saving = SavingSession()
    saving.queue(b"head", b"")
    assert saving.initial_end == saving.backlog == 4
    assert saving.read(4) == b"head"
    assert saving.read(1) == b""


class Saving(RuleBasedStateMachine):
    """Any sequence of records and reads, against the bytes of all records and one position."""

    def __init__(self) -> None:
        super().__init__()
        self.saving = SavingSession()
        self.stream = b""
        self.position = 0
        self.initial = 0

    @rule(record=st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3))
    def queue(self, record: list[bytes]) -> None:
        self.saving.queue(*record)
        self.stream += b"".join(record)
        self.initial = self.initial or len(self.stream)

    @rule(count=st.integers(0, 50))
    def read(self, count: int) -> None:
        expected = self.stream[self.position : self.position + count]
        assert self.saving.read(count) == expected
        self.position += len(expected)

    @invariant()
    def accounting(self) -> None:
        left = len(self.stream) - self.position
        assert self.saving.backlog == left
        found = self.saving.info(0)
        if self.position < self.initial:
            assert found == PrecopyInfo(self.initial - self.position, 0)
        else:
            assert found == PrecopyInfo(0, left)
        assert self.saving.info(5).dirty_bytes == (found.initial_bytes == 0) * (left + 5)
        assert self.saving.needs_refresh(5) == (left == 0)
        assert not self.saving.needs_refresh(0)


TestSaving = Saving.TestCase
