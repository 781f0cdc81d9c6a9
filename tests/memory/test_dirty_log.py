"""The dirty log against a model that knows every byte, and on the cases that clients will send."""

from __future__ import annotations

import tracemalloc
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import U64_END
from vfio_user_virtio.memory import dirty_log
from vfio_user_virtio.memory.dirty_log import CHUNK_PAGES, DirtyLog
from vfio_user_virtio.protocol.dirty_bitmap import bitmap_size_untrusted

TIB: Final = 1 << 40
GIB: Final = 1 << 30
WINDOW: Final = 700
"""Bytes that the byte model knows."""


def bits_of(bitmap: bytes) -> list[int]:
    """The numbers of the bits that are set."""
    value = int.from_bytes(bitmap, "little")
    return [bit for bit in range(8 * len(bitmap)) if value >> bit & 1]


class ByteModel:
    """Every dirty byte of a window by its address; marks and ranges are widened to whole pages."""

    def __init__(self, page_size: int, ranges: list[tuple[int, int]]) -> None:
        self.page_size = page_size
        self.logged: set[int] = set()
        for iova, length in ranges:
            self.logged |= self.pages(iova, length)
        self.all = not ranges
        self.dirty: set[int] = set()

    def pages(self, iova: int, length: int) -> set[int]:
        """The pages' first bytes."""
        return {byte - byte % self.page_size for byte in range(iova, iova + length)}

    def mark(self, iova: int, size: int) -> None:
        for page in self.pages(iova, size):
            if self.all or page in self.logged:
                self.dirty.update(range(page, page + self.page_size))

    def report_and_clear(self, iova: int, length: int, page_size: int) -> list[int]:
        found = {(byte - iova) // page_size for byte in self.dirty & {*range(iova, iova + length)}}
        for page in self.pages(iova, length):
            if iova <= page and page + self.page_size <= iova + length:
                self.dirty.difference_update(range(page, page + self.page_size))
        return sorted(found)


def log_pages(exponent: int) -> int:
    return 1 << exponent


def spans(longest: int) -> st.SearchStrategy[tuple[int, int]]:
    """A start in the window and a length that stays in it."""
    return st.integers(0, WINDOW - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(1, min(longest, WINDOW - start)))
    )


marks = st.tuples(st.none(), spans(100))
reports = st.tuples(st.integers(0, 12).map(log_pages), spans(WINDOW))


@given(
    page_size=st.integers(0, 6).map(log_pages),
    where=st.sampled_from(["zero", "chunk", "end"]),
    ranges=st.lists(spans(WINDOW), max_size=4),
    steps=st.lists(marks | reports, max_size=20),
)
def test_against_the_byte_model(
    page_size: int,
    where: str,
    ranges: list[tuple[int, int]],
    steps: list[tuple[int | None, tuple[int, int]]],
) -> None:
    border = {"zero": WINDOW // 2, "chunk": 3 * CHUNK_PAGES * page_size, "end": U64_END}[where]
    base = border - WINDOW if where == "end" else border - WINDOW // 2
    moved = [(base + start, length) for start, length in ranges]
    log, model = DirtyLog(page_size, moved), ByteModel(page_size, moved)
    for report_page, (start, length) in steps:
        if report_page is None:
            log.mark(base + start, length)
            model.mark(base + start, length)
        else:
            bitmap = log.report_and_clear(base + start, length, report_page)
            assert len(bitmap) == bitmap_size_untrusted(length, report_page, "report")
            expected = model.report_and_clear(base + start, length, report_page)
            assert bits_of(bitmap) == expected
        assert log.dirty_pages == len(model.dirty) // page_size


@given(
    exponent=st.integers(0, 40),
    report_exponent=st.integers(0, 63),
    iova=st.integers(0, U64_END - 1),
    bits=st.integers(1, 3000),
    tail=st.integers(0, U64_END),
    writes=st.lists(st.integers(0, U64_END - 1), max_size=12),
    data=st.data(),
)
def test_any_sizes_anywhere(
    exponent: int,
    report_exponent: int,
    iova: int,
    bits: int,
    tail: int,
    writes: list[int],
    data: st.DataObject,
) -> None:
    """Against one bit at a time, over the whole address space."""
    page_size, report_page = 1 << exponent, 1 << report_exponent
    length = min(bits * report_page - tail % report_page, U64_END - iova)
    near = st.integers(iova, iova + length - 1)
    writes += data.draw(st.lists(near, max_size=12))
    log = DirtyLog(page_size)
    for write in writes:
        log.mark(write, 1)
    pages = {write // page_size * page_size for write in writes}
    expected: set[int] = set()
    for page in pages:
        first, end = max(page, iova), min(page + page_size, iova + length)
        if first < end:
            expected.update(
                range((first - iova) // report_page, (end - 1 - iova) // report_page + 1)
            )
    assert bits_of(log.report_and_clear(iova, length, report_page)) == sorted(expected)
    inside = {page for page in pages if iova <= page and page + page_size <= iova + length}
    assert log.dirty_pages == len(pages - inside)


def test_bit_k_is_the_page_at_iova_plus_k_pages() -> None:
    log = DirtyLog()
    for page in (16, 17, 79, 80, 15, 81):
        log.mark(page << 12, 1)
    bitmap = log.report_and_clear(16 << 12, 65 << 12, 4096)
    assert bitmap == (1 | 1 << 1 | 1 << 63).to_bytes(8, "little") + (1).to_bytes(8, "little")
    assert log.report_and_clear(16 << 12, 65 << 12, 4096) == bytes(16)
    assert bits_of(log.report_and_clear(0, 1 << 20, 4096)) == [15, 81], "outside: not cleared"


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [(1, 4096, 8), (64 << 12, 4096, 8), ((64 << 12) + 1, 4096, 16), (32 * GIB, 4096, 1 << 20)],
)
def test_size_of_the_bitmap(length: int, page_size: int, size: int) -> None:
    assert len(DirtyLog().report_and_clear(0, length, page_size)) == size


def test_an_unaligned_tail_is_reported_and_stays_dirty() -> None:
    log = DirtyLog()
    log.mark(0, 8192)
    for _ in range(2):
        assert bits_of(log.report_and_clear(4096, 4095, 4096)) == [0]
    assert bits_of(log.report_and_clear(4096, 4096, 4096)) == [0]
    assert bits_of(log.report_and_clear(0, 8192, 4096)) == [0]


@pytest.mark.parametrize(
    ("page_size", "bits"),
    [
        (1024, [0, 1, 2, 3, 12, 13, 14, 15]),
        (4096, [0, 3]),
        (8192, [0, 1]),
        (32768, [0]),
        (1 << 63, [0]),
    ],
)
def test_report_in_pages_of_another_size(page_size: int, bits: list[int]) -> None:
    log = DirtyLog()
    log.mark(0, 10)
    log.mark(3 * 4096 + 5, 10)
    assert bits_of(log.report_and_clear(0, 16384, page_size)) == bits
    assert log.dirty_pages == 0


def test_report_in_pages_far_smaller_than_the_log_s() -> None:
    log = DirtyLog(1 << 20)
    log.mark(1 << 20, 1)
    log.mark(3 << 20, 1)
    page = 1 << 20 - 5 - 3
    bitmap = log.report_and_clear(0, 5 << 20, 1 << 5)
    assert bitmap == (bytes(page) + b"\xff" * page) * 2 + bytes(page)


def test_ranges_limit_what_is_logged() -> None:
    log = DirtyLog(4096, [(0x100000, 0x2000), (0, 0x1000), (0x8000, 0x1000)])
    log.mark(0, 0x200000)
    assert bits_of(log.report_and_clear(0, 0x200000, 4096)) == [0, 8, 0x100, 0x101]
    for page in (0, 1, 8, 9, 0x100, 0x101, 0x102):
        log.mark(page << 12, 1)
    assert bits_of(log.report_and_clear(0, 0x200000, 4096)) == [0, 8, 0x100, 0x101]


def test_overlapping_ranges_are_one() -> None:
    log = DirtyLog(4096, [(0x2000, 0x3000), (0x1000, 0x2000), (0x1000, 0x1000)])
    log.mark(0, 0x10000)
    assert log.dirty_pages == 4


def test_collected_pages_go_on_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_log, "MAX_FRESH", 4)
    log = DirtyLog(4096, [(0, 100 << 12)])
    for page in (*range(10), 99, 100, 101, 102, 3, 4, 5):
        log.mark(page << 12, 1)
    assert bits_of(log.report_and_clear(0, 200 << 12, 4096)) == [*range(10), 99]


def test_a_clean_tebibyte_costs_nothing_and_64_dirty_gib_cost_2_mib() -> None:
    tracemalloc.start()
    try:
        log = DirtyLog(4096, [(0, TIB)])
        log.mark(5 * GIB, 1500)
        assert bits_of(log.report_and_clear(0, TIB, GIB)) == [5]
        assert log.report_and_clear(0, TIB, GIB) == bytes(128)
        assert tracemalloc.get_traced_memory()[0] < 10_000
        log.mark(0, 64 * GIB)
        assert tracemalloc.get_traced_memory()[0] < 5 << 19
        assert log.dirty_pages == 64 * GIB >> 12
        assert bits_of(log.report_and_clear(0, TIB, GIB)) == [*range(64)]
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_a_log_that_overflows_calls_everything_dirty() -> None:
    chunk = CHUNK_PAGES * 4096
    log = DirtyLog(4096, [(0, 8 * chunk), (TIB, 4096)], max_chunks=2)
    log.mark(0, 1)
    log.mark(3 * chunk, 1)
    assert bits_of(log.report_and_clear(0, 8 * chunk, chunk)) == [0, 3]
    before = log.overflowed
    log.mark(0, 3 * chunk)
    assert (before, log.overflowed) == (False, True)
    for _ in range(2):
        log.mark(5 * chunk, 1)
        assert bits_of(log.report_and_clear(4096, 8 * chunk, chunk)) == [*range(8)]
    assert bits_of(log.report_and_clear(TIB - 4096, 3 * 4096, 4096)) == [1]
    assert bits_of(log.report_and_clear(9 * chunk, chunk, 4096)) == []
    assert log.dirty_pages == 0


@pytest.mark.parametrize("page_size", [0, -1, 3, 4097])
def test_page_sizes_that_are_none(page_size: int) -> None:
    with pytest.raises(ValueError, match="no power of two"):
        DirtyLog(page_size)
    with pytest.raises(ValueError, match="no power of two"):
        DirtyLog().report_and_clear(0, 4096, page_size)


@pytest.mark.parametrize(("iova", "length"), [(0, 0), (-1, 2), (1, U64_END), (U64_END, 1)])
def test_ranges_that_are_none(iova: int, length: int) -> None:
    with pytest.raises(ValueError, match="ends at 2"):
        DirtyLog(4096, [(iova, length)])
    with pytest.raises(ValueError, match="ends at 2"):
        DirtyLog().report_and_clear(iova, length, 4096)
