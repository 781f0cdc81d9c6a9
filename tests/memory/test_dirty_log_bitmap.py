"""Marking by bitmap, as hardware tells it, is marking each page of it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.memory.dirty_log import CHUNK_PAGES, DirtyLog

PAGES = st.integers(0, 3 * CHUNK_PAGES)
RANGES = st.lists(
    st.tuples(st.integers(0, 3 * CHUNK_PAGES), st.integers(1, CHUNK_PAGES)), max_size=3
)
SPAN = 8 * CHUNK_PAGES * PAGE_SIZE


def in_bytes(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in ranges]


@given(first=PAGES, bitmap=st.binary(max_size=64), ranges=RANGES)
@example(first=CHUNK_PAGES - 3, bitmap=b"\xff\xff", ranges=[])
@example(first=CHUNK_PAGES - 3, bitmap=b"\xff\xff", ranges=[(CHUNK_PAGES - 2, 1)])
@example(first=5, bitmap=b"\xff" * (CHUNK_PAGES // 4), ranges=[(8, 2), (20, CHUNK_PAGES)])
def test_a_bitmap_marks_what_its_pages_would(
    first: int, bitmap: bytes, ranges: list[tuple[int, int]]
) -> None:
    by_bitmap, by_page = DirtyLog(ranges=in_bytes(ranges)), DirtyLog(ranges=in_bytes(ranges))
    by_bitmap.mark_bitmap(first * PAGE_SIZE, bitmap)
    bits = int.from_bytes(bitmap, "little")
    for index in range(bits.bit_length()):
        if bits >> index & 1:
            by_page.mark((first + index) * PAGE_SIZE, 1)
    assert by_bitmap.dirty_pages == by_page.dirty_pages
    report = by_bitmap.report_and_clear(0, SPAN, PAGE_SIZE)
    assert report == by_page.report_and_clear(0, SPAN, PAGE_SIZE)


def test_bitmaps_are_added_to_what_is_there() -> None:
    log = DirtyLog()
    log.mark_bitmap(0, b"\x01")
    log.mark_bitmap(0, bytearray(b"\x02"))
    assert log.dirty_pages == 2


def test_a_bitmap_of_nothing_takes_no_room() -> None:
    log = DirtyLog(max_chunks=0)
    log.mark_bitmap(0, bytes(4096))
    assert not log.overflowed


def test_a_bitmap_can_be_too_much() -> None:
    log = DirtyLog(max_chunks=1)
    log.mark_bitmap((CHUNK_PAGES - 1) * PAGE_SIZE, b"\x03")
    assert log.overflowed
    log.mark_bitmap(0, b"\x01")
    assert log.report_and_clear(0, PAGE_SIZE, PAGE_SIZE)[0] == 1
