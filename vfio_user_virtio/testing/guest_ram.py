"""The memory of a guest that exists only in a test: a sealed memfd, shared with the device.

Why: what a device does to guest memory can be watched, and spoilt, from the test's own process.
The memfd carries the seals that QEMU's memory-backend-memfd,share=on puts on its own.  It is given
to the device by DMA_MAP, whole or page by page (as behind a vIOMMU), with its fd or without (then
the device reaches it by DMA_READ and DMA_WRITE, which `read` and `write` serve: it is the
`ServedMemory` of a `vfio_user_virtio.transport.client.Client`).

Addresses are IOVAs; here one address space serves the guest and its devices.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.limits import MIB, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

QEMU_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
READ_WRITE: Final = DmaAccess.READ | DmaAccess.WRITE


class DmaClient(Protocol):
    """The part of a vfio-user client that memory needs; fds stay the caller's."""

    async def dma_map(self, mapping: DmaMapping) -> None: ...

    async def dma_unmap(self, iova: int, size: int) -> None: ...


@attrs.frozen
class GuestBuffer:
    """Guest memory that was allocated: `size` bytes at `iova`, writable as `memory`."""

    iova: int
    size: int
    memory: memoryview


class GuestRam:
    """`size` bytes of guest memory from `iova` on, both multiples of the page size.

    A context manager; leaving it closes the fd and unmaps the memory (from this process: the
    device has its own mapping).
    """

    def __init__(
        self, size: int = 16 * MIB, *, iova: int = 0x4000_0000, seals: int = QEMU_SEALS
    ) -> None:
        self.size = size
        self.iova = iova
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        if seals:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self._mmap = mmap.mmap(self.fd, size)
        self._memory = memoryview(self._mmap)
        self._next = 0
        self._free: dict[int, list[int]] = {}  # offsets by rounded size
        self._taken: dict[int, int] = {}  # rounded size by IOVA

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the fd; the memory goes with the last `GuestBuffer` or view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._memory.release()
            del self._mmap

    # --- use of it by the guest ----------------------------------------------------------------

    def view(self, iova: int, size: int) -> memoryview:
        """The `size` bytes at `iova`, writable.  Raises ValueError outside of this memory."""
        offset = iova - self.iova
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"{iova:#x} + {size:#x} is not in guest memory")
        return self._memory[offset : offset + size]

    @property
    def allocated(self) -> int:
        """How many buffers are allocated and have not been freed."""
        return len(self._taken)

    def allocate(self, size: int, *, align: int = 64) -> GuestBuffer:
        """`size` bytes of zeroes at a multiple of `align`, a power of two up to the page size.

        Sizes are rounded up to powers of two, and what is freed is used again for the same.
        Raises MemoryError when nothing is left.
        """
        rounded = max(align, 1 << max(size - 1, 0).bit_length())
        free = self._free.get(rounded)
        if free:
            offset = free.pop()
        else:
            step = min(rounded, PAGE_SIZE)
            offset = (self._next + step - 1) & -step
            if offset + rounded > self.size:
                raise MemoryError(
                    f"{rounded} bytes do not fit in a guest's {self.size}; make it larger"
                )
            self._next = offset + rounded
        self._taken[self.iova + offset] = rounded
        memory = self._memory[offset : offset + size]
        memory[:] = bytes(size)
        return GuestBuffer(self.iova + offset, size, memory)

    def allocate_for_device(self, size: int) -> GuestBuffer:
        """As `allocate`, for what the device writes; a subclass may want to know."""
        return self.allocate(size)

    def free(self, buffer: GuestBuffer) -> None:
        """Give back what `allocate` gave.  Raises ValueError if that has been done."""
        rounded = self._taken.pop(buffer.iova, None)
        if rounded is None:
            raise ValueError(f"{buffer.iova:#x} is not allocated")
        self._free.setdefault(rounded, []).append(buffer.iova - self.iova)

    # --- use of it by the device ---------------------------------------------------------------

    def mappings(
        self, *, remote: bool = False, step: int | None = None, access: DmaAccess = READ_WRITE
    ) -> Iterator[DmaMapping]:
        """This memory in DMA mappings of `step` bytes (by default one); without fd if `remote`."""
        step = step or self.size
        for offset in range(0, self.size, step):
            size = min(step, self.size - offset)
            fd = None if remote else self.fd
            yield DmaMapping(self.iova + offset, size, access, fd, 0 if remote else offset)

    async def map(
        self,
        client: DmaClient,
        *,
        remote: bool = False,
        step: int | None = None,
        access: DmaAccess = READ_WRITE,
    ) -> None:
        """Send the `mappings` to the device.  Raises RemoteError if it refuses."""
        for mapping in self.mappings(remote=remote, step=step, access=access):
            await client.dma_map(mapping)

    async def unmap(self, client: DmaClient) -> None:
        """Take all of it back from the device, in one DMA_UNMAP."""
        await client.dma_unmap(self.iova, self.size)

    def read(self, address: int, count: int) -> bytes:
        """Serve DMA_READ.  Raises OSError ENODEV outside, which is what QEMU answers."""
        return bytes(self._served(address, count))

    def write(self, address: int, data: bytes) -> None:
        """Serve DMA_WRITE; errors as `read`."""
        self._served(address, len(data))[:] = data

    def _served(self, address: int, count: int) -> memoryview:
        try:
            return self.view(address, count)
        except ValueError as error:
            raise OSError(errno.ENODEV, str(error)) from error
