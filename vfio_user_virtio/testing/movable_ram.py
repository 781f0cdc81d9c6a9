"""The memory of a guest that moves: the pages behind a driver's views can be exchanged for others.

Why: a migrated guest goes on in a copy of its memory.  A driver of a test is full of memoryviews of
its rings and buffers, in the middle of whatever it was doing.  So the copy is mapped where the
original was (MAP_FIXED), as a guest's addresses stay what they are on another host.

Which pages have to be copied is known without the help of a kernel.  What a device may write
(`GuestRam.allocate_for_device`) has pages of its own here, and there the guest writes nothing but
what it writes when it allocates.  All other pages are the guest's alone.  So a copy of the guest's
pages, and of those that the device says that it wrote, has to be a copy of everything; `difference`
finds what the device kept to itself.

Rejected: going through all views of a driver and its queues to make them anew, which a test's own
views would be missed by; soft-dirty bits of the kernel, which not every kernel has.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

import cffi

from vfio_user_virtio.limits import MIB, PAGE_SIZE
from vfio_user_virtio.testing.guest_ram import GuestBuffer, GuestRam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAP_FIXED: Final = 0x10
_FFI: Final = cffi.FFI()
_FFI.cdef("void *mmap(void *address, size_t length, int prot, int flags, int fd, long offset);")
_MMAP: Final[Callable[..., object]] = getattr(_FFI.dlopen(None), "mmap")  # noqa: B009


class MovableRam(GuestRam):
    """See the module head.  Pages are numbered from 0, the one at `iova`."""

    def __init__(self, size: int = 16 * MIB, *, iova: int = 0x4000_0000) -> None:
        super().__init__(size, iova=iova)
        self._of_device: set[int] = set()
        self._fresh: set[int] = set()
        """Pages of the device that the guest has written since they were copied."""

    def allocate(self, size: int, *, align: int = 64) -> GuestBuffer:
        buffer = super().allocate(size, align=align)
        if self._of_device:
            self._of_device.difference_update(self._pages(buffer.iova, size))
        return buffer

    def allocate_for_device(self, size: int) -> GuestBuffer:
        """As `allocate`, in pages of its own; the caller writes it before it next waits, if ever.

        Raises MemoryError when nothing is left.
        """
        buffer = super().allocate(size, align=PAGE_SIZE)
        self._of_device.update(self._pages(buffer.iova, size))
        self.wrote(buffer.iova, size)
        return buffer

    def wrote(self, iova: int, size: int) -> None:
        """The guest has written to what is the device's, which it does not by itself."""
        self._fresh.update(self._pages(iova, size))

    def _pages(self, iova: int, size: int) -> range:
        start = iova - self.iova
        return range(start // PAGE_SIZE, -(-(start + size) // PAGE_SIZE))

    def copy_to(self, other: GuestRam, written: Iterable[int] = ()) -> int:
        """Copy the guest's own pages, and those of `written`, to the same place in `other`.

        How many pages that was.  The device's other pages are left as they are there.
        """
        left = self._of_device - self._fresh
        left.difference_update(written)
        self._fresh.clear()
        copied = 0
        for first, end in _gaps(left, self.size // PAGE_SIZE):
            offset, size = first * PAGE_SIZE, (end - first) * PAGE_SIZE
            other.view(other.iova + offset, size)[:] = self.view(self.iova + offset, size)
            copied += end - first
        return copied

    def difference(self, other: GuestRam) -> list[int]:
        """The pages that are not the same in `other`."""
        mine, theirs = (bytes(ram.view(ram.iova, self.size)) for ram in (self, other))
        if mine == theirs:
            return []
        pages = range(self.size // PAGE_SIZE)
        return [page for page in pages if _page(mine, page) != _page(theirs, page)]

    def move_into(self, other: GuestRam) -> None:
        """Be a view of the memory of `other` from now on, at the addresses of before.

        What was here stays with whoever has it mapped.  Raises ValueError if the sizes differ, or
        the guest's addresses.
        """
        if (other.size, other.iova) != (self.size, self.iova):
            raise ValueError(
                f"{other.size} bytes at {other.iova:#x} cannot take the place of "
                f"{self.size} at {self.iova:#x}"
            )
        here = _FFI.from_buffer(self._mmap)
        found = _MMAP(
            here,
            self.size,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | _MAP_FIXED,
            other.fd,
            0,
        )
        if found != here:
            raise OSError(_FFI.errno, "guest memory cannot be mapped again")


def _page(memory: bytes, page: int) -> bytes:
    return memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


def _gaps(pages: set[int], end: int) -> Iterator[tuple[int, int]]:
    """The ranges of 0 … `end` - 1 without `pages`, each as its first page and one past its last."""
    first = 0
    for page in sorted(pages):
        if first < page:
            yield first, page
        first = page + 1
    if first < end:
        yield first, end
