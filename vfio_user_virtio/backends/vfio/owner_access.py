"""A PCI function as its driver reaches it, so that a PF can be driven wherever it is.

`FunctionAccess` is what the owner needs of a PF.  Two things have it: `KernelAccess`, a function
that vfio-pci holds, and the vfio-user client of `transport`, which so can drive a PF that another
process serves.  A broker that holds the PF for several daemons would sit one floor higher, on the
`AdminQueue` that the owner is.

VFIO's calls block.  Registers are read and written where the call is made, as they take
microseconds; what pins memory or resets the device goes to a thread.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Protocol

import trio

from vfio_user_virtio.backends.vfio.kernel import (
    KernelRefusal,
    address_of,
    locked_memory_remedy,
)
from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from vfio_user_virtio.backends.vfio.opening import OpenedFunction
    from vfio_user_virtio.device import DmaMapping, IrqRequest


class FunctionAccess(Protocol):
    """See the module head.  Regions, interrupts and mappings are those of `Device`; eventfds and
    the fd of a mapping stay the caller's.  Raises HostError, RemoteError or ConnectionLost."""

    async def region_read(self, index: int, offset: int, count: int) -> bytes: ...

    async def region_write(self, index: int, offset: int, data: bytes) -> None: ...

    async def irq_info(self, index: int) -> IrqInfo: ...

    async def set_irqs(self, request: IrqRequest) -> None: ...

    async def dma_map(self, mapping: DmaMapping) -> None: ...

    async def dma_unmap(self, iova: int, size: int) -> None: ...

    async def reset(self) -> None: ...


class KernelAccess:
    """A `FunctionAccess` to a function that this process has opened; the caller closes that."""

    def __init__(self, opened: OpenedFunction) -> None:
        self._device = opened.device
        self._space = opened.space
        self._mapped: dict[int, mmap.mmap] = {}

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        return self._device.read(index, offset, count)

    async def region_write(self, index: int, offset: int, data: bytes) -> None:
        self._device.write(index, offset, data)

    async def irq_info(self, index: int) -> IrqInfo:
        if index >= len(self._device.irqs):
            return IrqInfo(0, IrqFlags(0))
        irq = self._device.irqs[index]
        return IrqInfo(irq.count, irq.flags)

    async def set_irqs(self, request: IrqRequest) -> None:
        """Arms with eventfds or, without any, disables the index; a driver needs no more."""
        if request.action is not IrqAction.TRIGGER:
            raise HostError(f"{self._device.name}: {request.action.name} is no driver's business")
        if request.eventfds:
            self._device.set_eventfds(request.index, request.start, request.eventfds)
        else:
            self._device.disable_irqs(request.index)

    async def dma_map(self, mapping: DmaMapping) -> None:
        limits = self._space.limits
        if not limits.holds(mapping.iova, mapping.size):
            raise HostError(
                f"{self._device.name}: the IOMMU cannot map {mapping.size:#x} bytes at "
                f"{mapping.iova:#x}; choose another address for the owner's memory"
            )
        assert mapping.fd is not None
        memory = mmap.mmap(mapping.fd, mapping.size, offset=mapping.offset)
        map_memory = self._space.map_memory
        arguments = mapping.iova, mapping.size, mapping.access, address_of(memory)
        try:
            await trio.to_thread.run_sync(map_memory, *arguments)
        except KernelRefusal as error:
            if error.errno != errno.ENOMEM:
                raise
            remedy = locked_memory_remedy(mapping.size, 0, self._device.name)
            raise KernelRefusal(error.errno, f"{error}; {remedy}") from error
        self._mapped[mapping.iova] = memory

    async def dma_unmap(self, iova: int, size: int) -> None:
        """Nothing if that is not mapped."""
        if iova in self._mapped:
            self._space.unmap(iova, size)
            del self._mapped[iova]

    async def reset(self) -> None:
        if self._device.can_reset:
            await trio.to_thread.run_sync(self._device.reset)

    def close(self) -> None:
        """Let go of the memory; after the device and its address space have been closed."""
        self._mapped.clear()
