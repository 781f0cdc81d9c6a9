"""A sorted map of intervals that do not overlap, inside [0, 2^64].

Why: a client behind a vIOMMU maps guest memory page by page (65,535 mappings), looks one up for
each buffer, and unmaps with ranges that go up to 2^64 and may hold nothing at all (QEMU's
intel-iommu sends a power-of-two ladder of them).

Two parallel lists, the starts (for `bisect`) and the entries.  An insertion or removal moves the
tails of two lists of pointers, at most 1 MiB of memmove at the limit: 5 µs each over 65,535
insertions at the front.  A removal cuts one slice out of each list, however many entries it takes.
Rejected: a tree (every look-up then runs in the interpreter, not in `bisect`) and a list of lists
(two bisects where one does).

Source: vfio-user, VFIO_USER_DMA_MAP and VFIO_USER_DMA_UNMAP; reference behaviour of QEMU 11.1.3.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from vfio_user_virtio.errors import ClientError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Interval(Protocol):
    """What the map holds: something that knows its bytes, `start` … `end` - 1."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


EntryT = TypeVar("EntryT", bound=Interval)


def describe(start: int, end: int) -> str:
    """A range as messages show it: first and last byte."""
    return f"[{start:#x}, {end - 1:#x}]"


class IntervalMap(Generic[EntryT]):
    """Entries by address.  Bounds are the caller's business: 0 ≤ start < end ≤ 2^64.

    `starts` and `entries` are public for look-ups that cannot afford a call; they are changed in
    place, never replaced, and only by this class.
    """

    __slots__ = ("entries", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.entries: list[EntryT] = []

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[EntryT]:
        return iter(self.entries)

    def find(self, address: int) -> EntryT | None:
        """The entry that holds the byte at `address`, or None."""
        index = bisect_right(self.starts, address) - 1
        if index >= 0 and address < (entry := self.entries[index]).end:
            return entry
        return None

    def check_free(self, start: int, end: int) -> None:
        """Raise ClientError EEXIST, naming both ranges, if an entry overlaps start … end - 1."""
        index = bisect_left(self.starts, end) - 1
        if index >= 0 and (entry := self.entries[index]).end > start:
            raise ClientError(
                errno.EEXIST,
                f"DMA_MAP: {describe(start, end)} overlaps the existing mapping "
                f"{describe(entry.start, entry.end)}; unmap that first",
            )

    def insert(self, entry: EntryT) -> None:
        """Add `entry`; raises ClientError EEXIST on overlap, and then changes nothing."""
        self.check_free(entry.start, entry.end)
        index = bisect_left(self.starts, entry.start)
        self.starts.insert(index, entry.start)
        self.entries.insert(index, entry)

    def remove_inside(self, start: int, end: int) -> list[EntryT]:
        """Remove and return every entry inside start … end - 1, in order; there may be none.

        Raises ClientError EINVAL, and changes nothing, if an entry lies only partly inside.
        """
        first = bisect_left(self.starts, start)
        last = bisect_left(self.starts, end)
        if first > 0 and self.entries[first - 1].end > start:
            self._refuse_split(start, end, self.entries[first - 1])
        if last > first and self.entries[last - 1].end > end:
            self._refuse_split(start, end, self.entries[last - 1])
        removed = self.entries[first:last]
        del self.entries[first:last]
        del self.starts[first:last]
        return removed

    def _refuse_split(self, start: int, end: int, entry: EntryT) -> None:
        raise ClientError(
            errno.EINVAL,
            f"DMA_UNMAP: {describe(start, end)} would split the mapping "
            f"{describe(entry.start, entry.end)}; unmap whole mappings only",
        )
