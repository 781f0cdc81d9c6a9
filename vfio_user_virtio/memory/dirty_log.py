"""Which pages of guest memory the device has written: what DMA logging reports.

Why: while a guest migrates, its memory is copied page by page, and pages that a device wrote after
they were copied have to be copied again.  One that is forgotten is a guest corrupted in silence,
one too many is only sent twice.  So where a page of the log is not wholly one thing or the other,
it counts as dirty: a page that a logged range touches is logged whole, and a page of which a report
covers only a part stays dirty.

A bit for each page, in chunks of 8,192 pages (1 KiB) that exist only where something is dirty: a
clean TiB costs nothing, and one that is dirty everywhere 32 MiB.  Beyond `limits.MAX_DIRTY_CHUNKS`,
which takes a guest that scatters its writes by means of a vIOMMU, the log gives up and calls
everything dirty from then on (`overflowed`).

`mark` is on the path of each packet, and a device writes the same pages again and again (a used
ring, buffers that come back).  So marked pages are collected in a set first, and go into the chunks
when it is full.  A report works on whole chunks, whatever its page size.

Rejected: only a set of page numbers (70 bytes for each), and one bitmap for each mapping (a write
to memory that was unmapped since still counts).

Source: vfio-user, VFIO_USER_DEVICE_FEATURE, DMA logging; linux/vfio.h,
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.device import U64_END
from vfio_user_virtio.memory.bitmap import coarsen, or_bits, refine, set_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_SHIFT: Final = 13
CHUNK_PAGES: Final = 1 << CHUNK_SHIFT
_CHUNK_SIZE: Final = CHUNK_PAGES // 8

MAX_FRESH: Final = 1_024
"""Pages that are collected before they go into the chunks: half a millisecond of work."""


class DirtyLog:
    """The log of one client, in pages of `page_size` bytes (a power of two).

    `ranges` are (iova, length) in bytes, what is logged; none means everything.
    Raises ValueError for a page size that is no power of two, or a range outside of 2^64.
    """

    def __init__(
        self,
        page_size: int = limits.PAGE_SIZE,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        max_chunks: int = limits.MAX_DIRTY_CHUNKS,
    ) -> None:
        _check_page_size(page_size)
        self.page_size: Final = page_size
        self.overflowed = False
        """Whether the log has given up: every page of the ranges is dirty, for good."""
        self._shift = page_size.bit_length() - 1
        self._max_chunks = max_chunks
        self._fresh: set[int] = set()
        self._chunks: dict[int, bytearray] = {}
        self._ranges = self._page_ranges(list(ranges) or [(0, U64_END)])
        self._starts = [first for first, _ in self._ranges]
        self._first, self._end = self._ranges[0]
        """The range that was hit last; all of these count pages."""

    @property
    def dirty_pages(self) -> int:
        """Pages that are dirty, counted when asked for; none are counted if `overflowed`."""
        self._flush()
        return sum(int.from_bytes(chunk, "little").bit_count() for chunk in self._chunks.values())

    def mark(self, iova: int, size: int) -> None:
        """The device wrote `size` ≥ 1 bytes at `iova`, ending at 2^64 or before."""
        page = iova >> self._shift
        end = (iova + size - 1 >> self._shift) + 1
        if end - page == 1:
            self._fresh.add(page)
            if len(self._fresh) >= MAX_FRESH:
                self._flush()
        else:
            self._mark_pages(page, end)

    def mark_bitmap(self, iova: int, bitmap: bytes | bytearray) -> None:
        """The device wrote the pages whose bits are set, counted from the one at `iova`.

        For what hardware tells; `iova` is a multiple of the page size, and no bit of a page beyond
        2^64 is set.
        """
        first, count = iova >> self._shift, 8 * len(bitmap)
        position = 0
        while position < count:
            page = first + position
            stop = min(count, position + CHUNK_PAGES - page % CHUNK_PAGES)
            piece = int.from_bytes(bitmap[position >> 3 : stop + 7 >> 3], "little")
            bits = piece >> (position & 7) & (1 << stop - position) - 1
            if bits:
                self._mark_bits(page, bits)
            position = stop

    def report_and_clear(self, iova: int, length: int, page_size: int) -> bytes:
        """The bitmap of `length` bytes at `iova` in pages of `page_size` (a power of two) bytes.

        Little-endian u64 words; bit k is set if a dirty page of the log overlaps the page at
        `iova` + k * `page_size`, as far as that is inside the range.  Pages of the log that are
        wholly inside the range are clean afterwards.  The size of the bitmap is the caller's to
        bound (`protocol.dirty_bitmap`).  Raises ValueError for a range or page size that is none.
        """
        _check_page_size(page_size)
        _check_range(iova, length)
        self._flush()
        bitmap = bytearray(8 * -(-length // (64 * page_size)))
        steps = page_size.bit_length() - self.page_size.bit_length()
        if self.overflowed or steps < -CHUNK_SHIFT:
            self._report_runs(bitmap, iova, length, page_size)
        else:
            self._report_chunks(bitmap, iova, length, steps)
        self._clear_pages(-(-iova >> self._shift), iova + length >> self._shift)
        return bytes(bitmap)

    def _page_ranges(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Sorted, in pages, those that touch joined."""
        found: list[tuple[int, int]] = []
        for iova, length in sorted(ranges):
            _check_range(iova, length)
            first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
            if found and first <= found[-1][1]:
                first, before = found.pop()
                end = max(end, before)
            found.append((first, end))
        return found

    def _flush(self) -> None:
        """Put the collected pages into the chunks."""
        chunks = self._chunks
        for page in self._fresh:
            chunk = chunks.get(page >> CHUNK_SHIFT)
            if chunk is not None and self._first <= page < self._end:
                chunk[page >> 3 & _CHUNK_SIZE - 1] |= 1 << (page & 7)
            else:
                self._mark_pages(page, page + 1)
        self._fresh.clear()

    def _mark_pages(self, first: int, end: int) -> None:
        """Mark those of the pages that are in a range."""
        for index in range(max(bisect_right(self._starts, first) - 1, 0), len(self._ranges)):
            range_first, range_end = self._ranges[index]
            if range_first >= end or self.overflowed:
                break
            if first < range_end:
                self._first, self._end = range_first, range_end
                self._mark_run(max(first, range_first), min(end, range_end))

    def _mark_run(self, first: int, end: int) -> None:
        while first < end:
            number = first >> CHUNK_SHIFT
            base = number << CHUNK_SHIFT
            stop = min(end, base + CHUNK_PAGES)
            chunk = self._chunk(number)
            if chunk is None:
                return
            set_bits(chunk, first - base, stop - base)
            first = stop

    def _mark_bits(self, page: int, bits: int) -> None:
        """Mark pages of one chunk, those that are in a range: bit 0 is `page`, others follow."""
        number = page >> CHUNK_SHIFT
        end = page + bits.bit_length()
        for index in range(max(bisect_right(self._starts, page) - 1, 0), len(self._ranges)):
            first, last = self._ranges[index]
            if first >= end or self.overflowed:
                break
            start, stop = max(first, page), min(last, end)
            chunk = self._chunk(number) if start < stop else None
            if chunk is not None:
                inside = bits >> start - page & (1 << stop - start) - 1
                or_bits(chunk, start - (number << CHUNK_SHIFT), inside)

    def _chunk(self, number: int) -> bytearray | None:
        """The chunk, made if need be; None if it cannot be, and the log has given up."""
        chunk = self._chunks.get(number)
        if chunk is None:
            if len(self._chunks) >= self._max_chunks:
                self.overflowed = True
                self._chunks.clear()
                return None
            chunk = self._chunks[number] = bytearray(_CHUNK_SIZE)
        return chunk

    def _chunks_between(self, first: int, end: int) -> list[int]:
        """The numbers of the chunks that hold pages first … end - 1, in no order."""
        low, high = first >> CHUNK_SHIFT, end - 1 >> CHUNK_SHIFT
        if high - low < len(self._chunks):
            return [number for number in range(low, high + 1) if number in self._chunks]
        return [number for number in self._chunks if low <= number <= high]

    def _dirty_bits(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The dirty ones of pages first … end - 1: a page, and the bits from there on."""
        for number in self._chunks_between(first, end):
            base = number << CHUNK_SHIFT
            start, stop = max(first, base), min(end, base + CHUNK_PAGES)
            bits = int.from_bytes(self._chunks[number], "little")
            yield start, bits >> start - base & (1 << stop - start) - 1

    def _dirty_runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The same as pages, first and end; if the log has given up, all of the ranges."""
        if self.overflowed:
            for range_first, range_end in self._ranges:
                if range_first < end and first < range_end:
                    yield max(first, range_first), min(end, range_end)
        for page, bits in self._dirty_bits(first, end):
            for index in range(bits.bit_length()):
                if bits >> index & 1:
                    yield page + index, page + index + 1

    def _report_runs(self, bitmap: bytearray, iova: int, length: int, page_size: int) -> None:
        """For few pages: those so large that a message's bitmap is over after 500."""
        first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
        for run_first, run_end in self._dirty_runs(first, end):
            start = max((run_first << self._shift) - iova, 0)
            last = min((run_end << self._shift) - iova, length) - 1
            set_bits(bitmap, start // page_size, last // page_size + 1)

    def _report_chunks(self, bitmap: bytearray, iova: int, length: int, steps: int) -> None:
        """Report pages are 2^steps log pages, or log pages 2^-steps report pages.

        The smaller of the two is the unit.  Where the range does not begin on one, every bit of the
        report covers parts of one unit more: that is the same report from a unit further on, or-ed.
        """
        first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
        finer = max(-steps, 0)
        unit_shift = self._shift - finer
        aligned = not iova & (1 << unit_shift) - 1
        count = -(-length >> unit_shift + max(steps, 0))
        for page, bits in self._dirty_bits(first, end):
            units = refine(bits, finer)
            start = (page << finer) - (iova >> unit_shift)
            _or_units(bitmap, start, units, max(steps, 0), count)
            if not aligned:
                _or_units(bitmap, start - 1, units, max(steps, 0), count)

    def _clear_pages(self, first: int, end: int) -> None:
        if first >= end:
            return
        for number in self._chunks_between(first, end):
            base = number << CHUNK_SHIFT
            start, stop = max(first - base, 0), min(end - base, CHUNK_PAGES)
            bits = int.from_bytes(self._chunks[number], "little")
            bits &= ~((1 << stop) - (1 << start))
            if bits:
                self._chunks[number][:] = bits.to_bytes(_CHUNK_SIZE, "little")
            else:
                del self._chunks[number]


def _check_page_size(page_size: int) -> None:
    if page_size <= 0 or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is no power of two")


def _check_range(iova: int, length: int) -> None:
    if iova < 0 or length <= 0 or iova + length > U64_END:
        raise ValueError(f"{length} bytes at {iova:#x}: a range has one at least, and ends at 2^64")


def _or_units(bitmap: bytearray, start: int, units: int, steps: int, count: int) -> None:
    """Set bit k < `count` if one of its 2^steps units is set; `units` begin with unit `start`."""
    if start < 0:
        units, start = units >> -start, 0
    near = min(steps, CHUNK_SHIFT)
    units = coarsen(units << (start & (1 << near) - 1), near)
    start >>= near
    if steps > near:  # a chunk is two bits by now, which may be the same one in the end
        low, high = start >> steps - near, start + 1 >> steps - near
        units = units & 1 | units >> 1 << high - low
        start = low
    if start + units.bit_length() > count:
        units &= (1 << count - start) - 1
    or_bits(bitmap, start, units)
