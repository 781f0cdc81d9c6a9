"""A client's memory, mapped in the IOMMU: who may map what, what overlaps, what it costs.

Each DMA_MAP that brings a file becomes one mapping of the kernel's, pinned from then on.  Where the
kernel maps memory files itself, that is all.  Where it maps only what is mapped here, each file is
mapped once into our address space, whole, however often the client sends it (`MappedFiles`).

A DMA_MAP without a file is taken and remembered, and the device cannot reach it: it is ROM, or
memory that the client did not share, or the BARs of another device (peer to peer).  Refusing it
would only make QEMU complain.

Pinning takes time, most of it for memory that nobody has touched before.  So what is more than
`limits.INLINE_PIN_BYTES` is done in a thread, and other sessions go on; the client waits for its
reply, QEMU no longer than 5 s.  What comes near that is told once, with the remedy.

An unmap takes away whatever lies inside its range, nothing being no error, and is over when the
kernel has unmapped: QEMU's vIOMMU sends ladders of them up to 2^64.  If the kernel ever refused
one, the device could still write to memory that the client has taken away; that is a HostError,
which ends the session.

Source: vfio-user, VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP; reference behaviour of QEMU 11.1.3.
"""

from __future__ import annotations

import errno
import logging
import os
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.kernel import (
    KernelRefusal,
    address_of,
    locked_memory_remedy,
)
from vfio_user_virtio.backends.vfio.memory_file import check_memory_file_untrusted
from vfio_user_virtio.device import U64_END, DmaAccess
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.interval_map import IntervalMap, describe
from vfio_user_virtio.memory.mapped_files import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.backends.vfio.address_space import IoAddressSpace
    from vfio_user_virtio.device import DmaMapping
    from vfio_user_virtio.memory.mapped_files import MappedFile

_log: Final = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


@attrs.frozen
class ClientMapping:
    """A mapping of the client's, `start` … `end` - 1.

    `pinned`: the device can reach it.  `file`: it is mapped here, too.
    """

    start: int
    end: int
    access: DmaAccess
    pinned: bool
    file: MappedFile | None = None


class UnmapObserver(Protocol):
    """Whoever has to know of a mapping before it goes."""

    def mapping_goes(self, mapping: ClientMapping) -> None: ...


class ClientMemory:
    """What one client has mapped in `space`; `name` is for messages.  Calls come one at a time."""

    def __init__(self, space: IoAddressSpace, name: str) -> None:
        self.observer: UnmapObserver | None = None
        self.pinned_bytes = 0
        """Counted per mapping, as the kernel counts it against RLIMIT_MEMLOCK."""
        self._space = space
        self._name = name
        self._map: IntervalMap[ClientMapping] = IntervalMap()
        self._files = MappedFiles(allow_unsealed=True)
        self._told_slow = False

    def __len__(self) -> int:
        return len(self._map)

    async def map_untrusted(self, mapping: DmaMapping) -> None:
        """Map, and close its fd.  Raises ClientError, and then nothing has changed."""
        try:
            self._check(mapping)
            if mapping.fd is None:
                self._insert(mapping, pinned=False)
                return
            check_memory_file_untrusted(mapping.fd, mapping)
            started = trio.current_time()
            try:
                file = await _in_thread_if(mapping.size, lambda: self._pin_untrusted(mapping))
            except KernelRefusal as error:
                raise ClientError(error.errno, self._explain(error, mapping)) from error
            self._insert(mapping, pinned=True, file=file)
            self._tell_slow(mapping, trio.current_time() - started)
        finally:
            if mapping.fd is not None:
                os.close(mapping.fd)

    async def unmap_untrusted(self, iova: int, size: int) -> None:
        """Drop what lies inside the range; see the module head.

        Raises ClientError for a range that is none, or would split a mapping; HostError if the
        kernel does not let go.
        """
        end = iova + size
        if iova < 0 or size <= 0 or end > U64_END:
            raise ClientError(
                errno.EINVAL, f"DMA_UNMAP: iova {iova:#x}, size {size:#x} is no range below 2^64"
            )
        gone = self._map.remove_inside(iova, end)
        pinned = [mapping for mapping in gone if mapping.pinned]
        if pinned:
            count = sum(mapping.end - mapping.start for mapping in pinned)
            await _in_thread_if(count, lambda: self._unpin(pinned))

    def clear(self) -> None:
        """Unmap everything.  Blocks.  Raises HostError."""
        gone = self._map.remove_inside(0, U64_END)
        try:
            self._space.unmap_all()
        finally:
            self._forget(gone)

    def overlapping(self, start: int, end: int) -> list[ClientMapping]:
        """The mappings that have a byte in start … end - 1, in order."""
        entries = self._map.entries
        index = max(bisect_right(self._map.starts, start) - 1, 0)
        found = []
        while index < len(entries) and entries[index].start < end:
            if entries[index].end > start:
                found.append(entries[index])
            index += 1
        return found

    # --- mapping -------------------------------------------------------------------------------

    def _check(self, mapping: DmaMapping) -> None:
        end = mapping.iova + mapping.size
        if mapping.iova < 0 or mapping.size <= 0 or end > U64_END:
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: iova {mapping.iova:#x}, size {mapping.size:#x} is no range below 2^64",
            )
        if not mapping.access:
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: {describe(mapping.iova, end)} may be neither read nor written; "
                "set one of the two flags",
            )
        known = self._space.limits
        page = max(known.page_size, limits.PAGE_SIZE)
        if mapping.iova % page or mapping.size % page:
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: iova {mapping.iova:#x} and size {mapping.size:#x} must be multiples of "
                f"{page}, the smallest page of the host's IOMMU",
            )
        self._map.check_free(mapping.iova, end)
        most = min(limits.MAX_DMA_MAPS, known.max_mappings or limits.MAX_DMA_MAPS)
        if len(self._map) >= most:
            raise ClientError(
                errno.ENOSPC,
                f"DMA_MAP: the limit of {most} mappings is reached; use huge pages in a guest "
                "behind a vIOMMU, or raise vfio_iommu_type1.dma_entry_limit",
            )
        if mapping.fd is not None and not known.holds(mapping.iova, mapping.size):
            ranges = ", ".join(f"[{low:#x}, {high:#x}]" for low, high in known.ranges)
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: {describe(mapping.iova, end)} is not in what the host's IOMMU can map: "
                f"{ranges}; give the guest less memory, or a narrower address width (-cpu "
                "phys-bits)",
            )

    def _pin_untrusted(self, mapping: DmaMapping) -> MappedFile | None:
        """Blocks.  Raises KernelRefusal or ClientError."""
        assert mapping.fd is not None
        iova, size, access = mapping.iova, mapping.size, mapping.access
        if self._space.maps_files:
            self._space.map_file(iova, size, access, mapping.fd, mapping.offset)
            return None
        file = self._files.acquire_untrusted(mapping.fd, mapping.offset, size, access)
        try:
            address = address_of(file.readable) + mapping.offset
            self._space.map_memory(iova, size, access, address)
        except BaseException:
            self._files.release(file)
            raise
        return file

    def _insert(self, mapping: DmaMapping, *, pinned: bool, file: MappedFile | None = None) -> None:
        end = mapping.iova + mapping.size
        self._map.insert(ClientMapping(mapping.iova, end, mapping.access, pinned, file))
        if pinned:
            self.pinned_bytes += mapping.size

    def _explain(self, error: KernelRefusal, mapping: DmaMapping) -> str:
        message = f"DMA_MAP: {error}"
        if error.errno == errno.ENOMEM:
            message += "; " + locked_memory_remedy(mapping.size, self.pinned_bytes, self._name)
        return message

    def _tell_slow(self, mapping: DmaMapping, seconds: float) -> None:
        if seconds > limits.SLOW_PIN_SECONDS and not self._told_slow:
            self._told_slow = True
            _log.warning(
                "%s: mapping %d MiB of guest memory took %.1f s; QEMU gives up after 5 s: raise "
                "its limit (x-msg-timeout=60000 on the device), or give the guest huge pages that "
                "are there beforehand (memory-backend-memfd,hugetlb=on,prealloc=on)",
                self._name,
                mapping.size // limits.MIB,
                seconds,
            )

    # --- unmapping -----------------------------------------------------------------------------

    def _unpin(self, gone: Sequence[ClientMapping]) -> None:
        """One unmap for all: what lies between them is not mapped.  Blocks."""
        try:
            if self.observer is not None:
                for mapping in gone:
                    self.observer.mapping_goes(mapping)
            start = gone[0].start
            self._space.unmap(start, gone[-1].end - start)
        finally:
            self._forget(gone)

    def _forget(self, gone: Sequence[ClientMapping]) -> None:
        for mapping in gone:
            if mapping.pinned:
                self.pinned_bytes -= mapping.end - mapping.start
            if mapping.file is not None:
                self._files.release(mapping.file)


async def _in_thread_if(count: int, step: Callable[[], ResultT]) -> ResultT:
    """Do `step`, which pins or unpins `count` bytes; what is large is not done on this thread."""
    if count <= limits.INLINE_PIN_BYTES:
        return step()
    return await trio.to_thread.run_sync(step)
