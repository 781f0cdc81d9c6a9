"""Guest memory by IOVA: the client's DMA mappings, given out as memoryviews of shared memory.

Why: rings and packets live in guest memory, and a packet may cost no copy and next to no code.  A
look-up is one comparison with the mapping that the last one hit, else with that which the page's
last one hit, and one slice; so it costs the same with one mapping and with one per page, as long
as the buffers in use are not many more than `CACHED_PAGES`.  What is not cached is one `bisect`.

Holders of views.  A view keeps its memory mapped in our address space for as long as it lives,
also after the client unmapped it: nothing crashes, but the device would go on reading and writing
memory that is no longer the guest's to lend.  So whoever keeps a view beyond the call in which it
asked for it must `subscribe`, and drop it when called.  A view that lives on in somebody's local
neither makes an unmap fail nor leaks: the memory goes with the last view.

Not safe for threads; everything happens on the thread of the event loop.

Source: vfio-user, VFIO_USER_DMA_MAP and VFIO_USER_DMA_UNMAP, with what QEMU 11.1.3 does with a
vIOMMU: ranges up to 2^64 that hold nothing, and one mapping per page.
"""

from __future__ import annotations

import contextlib
import errno
import os
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping
from vfio_user_virtio.errors import ClientError, DriverError
from vfio_user_virtio.memory.interval_map import IntervalMap, describe
from vfio_user_virtio.memory.mapped_files import MappedFile, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable

_PAGE_SHIFT: Final = limits.PAGE_SIZE.bit_length() - 1
CACHED_PAGES: Final = 4_096
"""Enough for all buffers of eight full queue pairs; some 0.5 MiB when they are in use."""

_NO_BYTES: Final = memoryview(bytearray())
_NO_BYTES_READ_ONLY: Final = _NO_BYTES.toreadonly()


class RemoteOnly(Exception):
    """The range is mapped and may be accessed, but some of it came without an fd.

    Only messages reach it: see `vfio_user_virtio.memory.access.GuestAccess`.
    """


@attrs.frozen
class GuestMemoryStatistics:
    """Counts of one client's guest memory; `files` are kernel mappings of ours."""

    maps: int
    files: int
    mapped_bytes: int
    remote_bytes: int


@attrs.frozen
class MappedRange:
    """A DMA mapping: `size` bytes at `iova`; `file`: it came with one, and no message is needed."""

    iova: int
    size: int
    access: DmaAccess
    file: bool


@attrs.frozen
class Piece:
    """A part of a range: `size` bytes at `iova`; `memory` None if only messages reach them."""

    iova: int
    size: int
    memory: memoryview | None


class Region:
    """One DMA mapping.  Byte `iova` of it is byte `iova` + `delta` of the views of its file.

    `readable` and `writable` are views of the whole file, None where the mapping has not the
    access or came without an fd (`file` None).
    """

    __slots__ = ("access", "delta", "end", "file", "readable", "start", "writable")

    def __init__(self, mapping: DmaMapping, file: MappedFile | None) -> None:
        self.start = mapping.iova
        self.end = mapping.iova + mapping.size
        self.access = mapping.access
        self.file = file
        self.delta = mapping.offset - mapping.iova
        self.readable: memoryview | None = None
        self.writable: memoryview | None = None
        if file is not None and self.access & DmaAccess.READ:
            self.readable = file.readable
        if file is not None and self.access & DmaAccess.WRITE:
            self.writable = file.writable


_NOWHERE: Final = Region(DmaMapping(-1, 0, DmaAccess(0)), None)
"""A region that no address is in."""


class GuestMemory:
    """One client's guest memory.

    `generation` changes with each mapping and unmapping that did something.
    """

    def __init__(
        self, *, allow_unsealed: bool = False, max_maps: int = limits.MAX_DMA_MAPS
    ) -> None:
        self.generation = 0
        self._max_maps = max_maps
        self._files = MappedFiles(allow_unsealed=allow_unsealed)
        self._regions: IntervalMap[Region] = IntervalMap()
        self._starts = self._regions.starts
        self._entries = self._regions.entries
        self._last = _NOWHERE
        self._pages: dict[int, Region] = {}
        self._callbacks: dict[object, Callable[[int, int], None]] = {}

    def subscribe(self, callback: Callable[[int, int], None]) -> Callable[[], None]:
        """Have `callback(start, end)` called before memory at start … end - 1 is released.

        It must drop every view it keeps of that range; the range is out of the map by then, so a
        look-up shows what is left.  It must not raise.  Calling the result ends the subscription.
        """
        token = object()
        self._callbacks[token] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(token, None)

        return unsubscribe

    def map(self, mapping: DmaMapping) -> None:
        """Add `mapping` (DMA_MAP).  Its fd is ours from the call on and closed when it returns.

        Raises ClientError, and then changes nothing: EEXIST on overlap, ENOSPC beyond a bound,
        EINVAL for a range or file we cannot take, EPERM without F_SEAL_SHRINK, EACCES for an fd
        that was not opened for the access, or what mmap failed with.
        """
        try:
            _check_map_untrusted(mapping)
            end = mapping.iova + mapping.size
            self._regions.check_free(mapping.iova, end)
            if len(self._regions) >= self._max_maps:
                raise ClientError(
                    errno.ENOSPC,
                    f"DMA_MAP: the limit of {self._max_maps} mappings is reached; "
                    "unmap some, or use larger pages in the guest's IOMMU",
                )
            file = None
            if mapping.fd is not None:
                file = self._files.acquire_untrusted(
                    mapping.fd, mapping.offset, mapping.size, mapping.access
                )
        finally:
            if mapping.fd is not None:
                with contextlib.suppress(OSError):  # the fd is gone whatever close reports
                    os.close(mapping.fd)
        self._regions.insert(Region(mapping, file))
        self.generation += 1

    def unmap(self, iova: int, size: int) -> None:
        """Drop every mapping inside the `size` bytes at `iova` (DMA_UNMAP), none being an error.

        0, 2^64 drops everything.  Raises ClientError EINVAL, and then changes nothing, for a range
        that is empty, exceeds 2^64 or would split a mapping.
        """
        end = iova + size
        if iova < 0 or size <= 0 or end > U64_END:
            raise ClientError(
                errno.EINVAL,
                f"DMA_UNMAP: iova {iova:#x}, size {size:#x}: "
                "a range has at least one byte and ends at 2^64 or before",
            )
        removed = self._regions.remove_inside(iova, end)
        if not removed:
            return
        self._last = _NOWHERE
        self._pages.clear()
        self.generation += 1
        try:
            for callback in list(self._callbacks.values()):
                callback(removed[0].start, removed[-1].end)
        finally:
            for region in removed:
                region.readable = region.writable = None
                if region.file is not None:
                    self._files.release(region.file)

    def clear(self) -> None:
        """Drop every mapping."""
        self.unmap(0, U64_END)

    def view(self, iova: int, size: int, write: bool) -> memoryview | None:
        """The `size` bytes at `iova` as one view, writable if `write` and else read-only.

        None if they are not one contiguous piece of memory with that access (then `views` tells
        why).  No bytes are an empty view, anywhere.  This is the hot path of every packet.
        """
        region = self._last
        if not region.start <= iova < region.end:
            try:
                region = self._pages[iova >> _PAGE_SHIFT]
            except KeyError:
                region = self._find(iova)
            self._last = region
        if iova + size <= region.end:
            memory = region.writable if write else region.readable
            if memory is not None:
                offset = iova + region.delta
                return memory[offset : offset + size]
        return self._spanning_view(iova, size, write=write)

    def _find(self, iova: int) -> Region:
        """The region that `iova` is in, remembered for its page, which no other region shares."""
        index = bisect_right(self._starts, iova) - 1
        if index < 0 or iova >= self._entries[index].end:
            return _NOWHERE
        if len(self._pages) >= CACHED_PAGES:
            self._pages.clear()
        region = self._pages[iova >> _PAGE_SHIFT] = self._entries[index]
        return region

    def views(self, iova: int, size: int, write: bool) -> list[memoryview]:
        """The `size` bytes at `iova` as a scatter list, in order; no bytes are an empty list.

        Neighbours that are contiguous in one file are one piece.  Raises DriverError if a byte is
        not mapped or not with that access, RemoteOnly if one is in a mapping without an fd.
        """
        found: list[memoryview] = []
        for piece in self.pieces(iova, size, write=write):
            if piece.memory is None:
                raise RemoteOnly(
                    f"guest memory {describe(piece.iova, piece.iova + piece.size)} was mapped "
                    "without an fd; only messages reach it"
                )
            found.append(piece.memory)
        return found

    def pieces(self, iova: int, size: int, *, write: bool) -> list[Piece]:
        """As `views`, but with the pieces in mappings without an fd, as pieces without memory."""
        if size and (whole := self.view(iova, size, write)) is not None:
            return [Piece(iova, size, whole)]
        end = iova + size
        wanted = DmaAccess.WRITE if write else DmaAccess.READ
        found: list[Piece] = []
        memory: memoryview | None = None
        start = position = iova
        delta = 0
        index = bisect_right(self._starts, iova) - 1
        while position < end:
            region = self._entries[index] if 0 <= index < len(self._entries) else _NOWHERE
            if not region.start <= position < region.end:
                raise DriverError(
                    f"guest memory {describe(iova, end)} is not mapped at {position:#x}; "
                    "the driver passed an address outside of the memory that the device may use"
                )
            if not region.access & wanted:
                raise DriverError(
                    f"guest memory {describe(iova, end)} may not be accessed at {position:#x}: "
                    f"{wanted!r} is asked, but {describe(region.start, region.end)} is mapped for "
                    f"{region.access!r}"
                )
            here = region.writable if write else region.readable
            if here is not memory or (here is not None and region.delta != delta):
                if position > start:
                    found.append(_piece(start, position, memory, delta))
                start = position
            memory, delta = here, region.delta
            position = min(end, region.end)
            index += 1
        if position > start:
            found.append(_piece(start, position, memory, delta))
        return found

    def _spanning_view(self, iova: int, size: int, *, write: bool) -> memoryview | None:
        """What `view` does when the range is not inside one mapping."""
        if size == 0:
            return _NO_BYTES if write else _NO_BYTES_READ_ONLY
        index = bisect_right(self._starts, iova) - 1
        if index < 0 or iova >= (region := self._entries[index]).end:
            return None
        memory, delta = (region.writable if write else region.readable), region.delta
        if memory is None:
            return None
        while region.end < iova + size:
            index += 1
            if index == len(self._entries) or self._entries[index].start != region.end:
                return None
            region = self._entries[index]
            here = region.writable if write else region.readable
            if here is not memory or region.delta != delta:
                return None
        return memory[iova + delta : iova + delta + size]

    def mappings(self) -> list[MappedRange]:
        """What is mapped, in the order of addresses."""
        return [
            MappedRange(one.start, one.end - one.start, one.access, one.file is not None)
            for one in self._regions
        ]

    def statistics(self) -> GuestMemoryStatistics:
        """Counted when asked for, in time linear in the number of mappings."""
        mapped = sum(r.end - r.start for r in self._regions if r.file is not None)
        total = sum(r.end - r.start for r in self._regions)
        return GuestMemoryStatistics(
            maps=len(self._regions),
            files=len(self._files),
            mapped_bytes=mapped,
            remote_bytes=total - mapped,
        )


def _piece(start: int, end: int, memory: memoryview | None, delta: int) -> Piece:
    found = None if memory is None else memory[start + delta : end + delta]
    return Piece(start, end - start, found)


def _check_map_untrusted(mapping: DmaMapping) -> None:
    end = mapping.iova + mapping.size
    if mapping.iova < 0 or mapping.size <= 0 or end > U64_END:
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: iova {mapping.iova:#x}, size {mapping.size:#x}: "
            "a mapping has at least one page and ends at 2^64 or before",
        )
    if mapping.iova % limits.PAGE_SIZE or mapping.size % limits.PAGE_SIZE:
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: iova {mapping.iova:#x} and size {mapping.size:#x} "
            f"must be multiples of {limits.PAGE_SIZE} (pgsizes)",
        )
    if not mapping.access & (DmaAccess.READ | DmaAccess.WRITE):
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: {describe(mapping.iova, end)} may be neither read nor written; "
            "set one of the two flags",
        )
