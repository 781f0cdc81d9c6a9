"""The memory that a device may reach: addresses of its own, mapped by the IOMMU to ours.

Linux has two ways to it, a container of groups (`group`) and an IOAS of iommufd (`iommufd`); this
is what both can do, in the words of neither.  Policy is not here: who may map what, what overlaps,
what is accounted for (`dma`).

A mapping pins its memory and stays until it is unmapped, whole; nothing is unmapped in part.  When
`unmap` returns, the device can no longer reach it, and the kernel holds no reference to it.

Calls block, as long as it takes to pin, and longest for memory that nobody has touched before.
They may be made in a thread.  All raise KernelRefusal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from vfio_user_virtio.device import DmaAccess


@attrs.frozen
class AddressLimits:
    """What the IOMMU can map: (first, last) addresses in `ranges` (none: not known), in multiples
    of `page_size` bytes, in so many mappings (None: any)."""

    page_size: int
    ranges: tuple[tuple[int, int], ...] = ()
    max_mappings: int | None = None

    def holds(self, iova: int, size: int) -> bool:
        """Whether `size` ≥ 1 bytes at `iova` are inside one range."""
        last = iova + size - 1
        return not self.ranges or any(low <= iova and last <= high for low, high in self.ranges)


class IoAddressSpace(Protocol):
    """See the module head.  Addresses and sizes are in bytes, multiples of the page size."""

    @property
    def limits(self) -> AddressLimits: ...

    @property
    def maps_files(self) -> bool:
        """Whether `map_file` works; else files must be mapped into our memory first."""
        ...

    @property
    def tracks_dirty(self) -> bool:
        """Whether the hardware can tell which pages the device has written."""
        ...

    def map_memory(self, iova: int, size: int, access: DmaAccess, address: int) -> None:
        """Map our own memory at `address` (`kernel.address_of`), which stays mapped meanwhile."""
        ...

    def map_file(self, iova: int, size: int, access: DmaAccess, fd: int, offset: int) -> None:
        """Map a memory file (memfd, tmpfs, hugetlbfs) from `offset` on; `fd` may be closed then."""
        ...

    def unmap(self, iova: int, size: int) -> None:
        """Unmap what lies in the range: whole mappings, and at least one."""
        ...

    def unmap_all(self) -> None:
        """Unmap everything, if there is anything."""
        ...

    def set_dirty_tracking(self, on: bool) -> None:
        """Only if `tracks_dirty`.  Turning it on forgets what was written before."""
        ...

    def dirty_bitmap(self, iova: int, size: int, page_size: int, *, clear: bool) -> bytearray:
        """A bit for each page of a range that is mapped without a gap: was it written?

        In whole u64 words, little-endian; `clear` begins anew.  Only while tracking is on.
        """
        ...

    def close(self) -> None:
        """Let go of everything; the device must have been closed before."""
        ...
