"""A device made of plain memory, to serve in tests of the transport: no PCI, no virtio.

BAR 0 is trapped memory; BAR 2 is a memfd that the client may map, but for its first page; region 7
is a configuration space; the other regions are absent.  It writes down every call, so that a test
can say what reached the device, and can be told to fail.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.device import (
    DeviceFlags,
    DeviceInfo,
    DmaMapping,
    FeatureOperation,
    IrqFlags,
    IrqInfo,
    IrqRequest,
    RegionFlags,
    RegionInfo,
    RemoteMemory,
    ResetCause,
    SparseArea,
    VfioIrq,
    VfioRegion,
)
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BAR0_SIZE: Final = 2 << 20
BAR2_SIZE: Final = 0x4000
CONFIG_SIZE: Final = 4096
BAR2_FD_OFFSET: Final = 0x1000
READ_WRITE: Final = RegionFlags.READ | RegionFlags.WRITE


async def _nothing(memory: RemoteMemory) -> None:
    del memory
    await trio.sleep_forever()


class MemoryDevice:
    """See the module head; satisfies `vfio_user_virtio.device.Device`."""

    def __init__(self, serve: Callable[[RemoteMemory], Awaitable[None]] = _nothing) -> None:
        self._serve = serve
        self.fd = os.memfd_create("memory-device", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, BAR2_FD_OFFSET + BAR2_SIZE)
        self.memory = {
            VfioRegion.BAR0: bytearray(BAR0_SIZE),
            VfioRegion.CONFIG: bytearray(CONFIG_SIZE),
        }
        self.calls: list[str] = []
        self.writes: list[tuple[int, int, bytes]] = []
        self.irqs: list[IrqRequest] = []
        self.guest = GuestMemory()
        self.feature_data = b""
        self.stream = bytearray()
        self.failure: BaseException | None = None
        self.hold: trio.Event | None = None
        self.works = 0
        self.releases = 0
        self.serving = 0
        self._session_fds: list[int] = []

    def close(self) -> None:
        """Give back what belongs to the device itself, beyond sessions."""
        os.close(self.fd)

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, num_regions=9, num_irqs=5)

    def region_info(self, index: int) -> RegionInfo:
        match index:
            case VfioRegion.BAR0:
                return RegionInfo(BAR0_SIZE, READ_WRITE)
            case VfioRegion.BAR2:
                areas = (SparseArea(0x1000, 0x1000), SparseArea(0x3000, 0x1000))
                flags = READ_WRITE | RegionFlags.MMAP
                return RegionInfo(BAR2_SIZE, flags, self.fd, BAR2_FD_OFFSET, areas)
            case VfioRegion.BAR4:
                return RegionInfo(BAR2_SIZE, RegionFlags.READ | RegionFlags.MMAP, self.fd)
            case VfioRegion.CONFIG:
                return RegionInfo(CONFIG_SIZE, READ_WRITE)
        return RegionInfo(0, RegionFlags(0))

    def irq_info(self, index: int) -> IrqInfo:
        match index:
            case VfioIrq.INTX:
                return IrqInfo(1, IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED)
            case VfioIrq.MSIX:
                return IrqInfo(20, IrqFlags.EVENTFD)
            case VfioIrq.ERR:
                return IrqInfo(1, IrqFlags.EVENTFD | IrqFlags.NORESIZE)
        return IrqInfo(0, IrqFlags(0))

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        await self._call("region_read")
        if index in (VfioRegion.BAR2, VfioRegion.BAR4):
            return os.pread(self.fd, count, BAR2_FD_OFFSET + offset)
        return bytes(self.memory[VfioRegion(index)][offset : offset + count])

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        await self._call("region_write")
        self.writes.append((index, offset, bytes(data)))
        if index == VfioRegion.BAR2:
            os.pwrite(self.fd, data, BAR2_FD_OFFSET + offset)
        else:
            self.memory[VfioRegion(index)][offset : offset + len(data)] = data

    async def set_irqs(self, request: IrqRequest) -> None:
        if request.eventfds:
            self._session_fds.extend(request.eventfds)
        await self._call("set_irqs")
        self.irqs.append(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        try:
            await self._call("dma_map")
        except BaseException:
            if mapping.fd is not None:
                os.close(mapping.fd)
            raise
        self.guest.map(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self._call("dma_unmap")
        self.guest.unmap(iova, size)

    async def reset(self, cause: ResetCause) -> None:
        await self._call(f"reset {cause.name}")

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        if operation & FeatureOperation.PROBE and index in (1, 2):
            return b""  # asked before the client asks anything, by some engines
        await self._call("feature")
        if index not in (1, 2):
            raise ClientError(errno.ENOTTY, f"device feature {index} is unknown")
        if operation & FeatureOperation.SET:
            self.feature_data = data
            return data
        return self.feature_data

    async def migration_read(self, count: int) -> bytes:
        await self._call("migration_read")
        data = bytes(self.stream[:count])
        del self.stream[:count]
        return data

    async def migration_write(self, data: bytes | memoryview) -> None:
        await self._call("migration_write")
        self.stream += data

    async def precopy_info(self) -> tuple[int, int]:
        await self._call("precopy_info")
        return len(self.stream), 0

    def work(self) -> None:
        self.works += 1

    async def serve(self, memory: RemoteMemory) -> None:
        self.serving += 1
        try:
            await self._serve(memory)
        finally:
            self.serving -= 1

    async def release(self) -> None:
        self.releases += 1
        while self._session_fds:
            os.close(self._session_fds.pop())
        self.guest.clear()
        await self._call("release")
