"""The Device seam: what a session serves, whatever it is made of.

A session (or another engine) speaks the wire and knows nothing of virtio; a backend knows its
device and nothing of the wire.  Between them stands `Device`.  The arguments are plain, already
range-checked against what the device says of itself, and in units of bytes.

Calls come one at a time, in the order in which the client sent them.  They are async because
hardware may make one wait; the software model answers without suspending.  A device must never
wait for the client inside a call: QEMU holds its big lock until the reply, so a DMA message sent
from there would wait for ever.  Such work belongs in `Device.serve`, the device's own task.

Errors: `ClientError` becomes an error reply; nothing else may leave a call.
"""

from __future__ import annotations

import enum
import errno
from typing import Final, Protocol

import attrs

from vfio_user_virtio.errors import ClientError


class VfioRegion(enum.IntEnum):
    """Region indices of a PCI device (vfio-user, VFIO_USER_DEVICE_GET_REGION_INFO)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class VfioIrq(enum.IntEnum):
    """Interrupt indices of a PCI device (vfio-user, VFIO_USER_DEVICE_GET_IRQ_INFO)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class ResetCause(enum.Enum):
    """Why a device is reset."""

    CLIENT = "the client sent DEVICE_RESET"
    FUNCTION_LEVEL = "the guest wrote Initiate Function Level Reset"
    POWER_STATE = "the guest moved the function from D3hot to D0"


class DeviceFlags(enum.IntFlag):
    """Flags of VFIO_USER_DEVICE_GET_INFO."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionFlags(enum.IntFlag):
    """Flags of VFIO_USER_DEVICE_GET_REGION_INFO; CAPS is the wire's business, not the device's."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IrqFlags(enum.IntFlag):
    """Flags of VFIO_USER_DEVICE_GET_IRQ_INFO."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqAction(enum.Enum):
    """What VFIO_USER_DEVICE_SET_IRQS does to the interrupts it names."""

    MASK = 1 << 3
    UNMASK = 1 << 4
    TRIGGER = 1 << 5


class DmaAccess(enum.IntFlag):
    """What a device may do with a DMA mapping (flags of VFIO_USER_DMA_MAP)."""

    READ = 1 << 0
    WRITE = 1 << 1


@attrs.frozen
class DeviceInfo:
    """A device as VFIO_USER_DEVICE_GET_INFO shows it."""

    flags: DeviceFlags
    num_regions: int
    num_irqs: int


@attrs.frozen
class SparseArea:
    """A part of a region that may be mapped, `offset` and `size` in bytes, page aligned."""

    offset: int
    size: int


@attrs.frozen
class RegionInfo:
    """A region: its size in bytes (0 when absent), its flags, and how it may be mapped.

    `fd`, if not None, stays the device's; the session passes a copy.  It is mapped from
    `fd_offset` + area.offset.  No areas and flag MMAP means: the whole region.
    """

    size: int
    flags: RegionFlags
    fd: int | None = None
    fd_offset: int = 0
    areas: tuple[SparseArea, ...] = ()


@attrs.frozen
class IrqInfo:
    """An interrupt index: how many sub-indices it has (0 when absent) and its flags."""

    count: int
    flags: IrqFlags


@attrs.frozen
class IrqRequest:
    """One SET_IRQS: `action` on sub-indices `start` … `start` + `count` - 1 of `index`.

    Exactly one kind of data: `eventfds` (one per sub-index, or empty to de-assign the range;
    TRIGGER only), `bools` (one per sub-index: act only where true), or neither (act on the whole
    range).  TRIGGER with neither and `count` 0 disables the whole index; TRIGGER with bools or
    neither and a count injects the interrupt.  The device owns the eventfds from the call on, even
    if it raises.
    """

    index: int
    start: int
    count: int
    action: IrqAction
    eventfds: tuple[int, ...] | None = None
    bools: tuple[bool, ...] | None = None


@attrs.frozen
class DmaMapping:
    """Guest memory at `iova` … `iova` + `size` - 1, found at `offset` of `fd`.

    Without an fd it can be reached only by messages (`RemoteMemory`).  The device owns the fd from
    the call on, even if it raises.
    """

    iova: int
    size: int
    access: DmaAccess
    fd: int | None = None
    offset: int = 0


@attrs.frozen
class LoggingStart:
    """Log writes in pages of `page_size` bytes, in `ranges` of (iova, length), or everywhere.

    The page size is a hint, a power of two.
    """

    page_size: int
    ranges: tuple[tuple[int, int], ...] = ()


@attrs.frozen
class LoggingReport:
    """Which of the pages of `page_size` bytes in `iova` … `iova` + `length` - 1 were written?"""

    iova: int
    length: int
    page_size: int


class RemoteMemory(Protocol):
    """Guest memory reached by messages to the client, for mappings that came without an fd.

    Never to be awaited inside a `Device` call that the client waits for (see the module head).
    Raises `RemoteError` when the client refuses, `ConnectionLost` when it has gone or does not
    answer in time.  `count` may be any size; pieces of at most
    `vfio_user_virtio.limits.REMOTE_DMA_CHUNK` bytes travel.
    """

    async def dma_read(self, iova: int, count: int) -> bytes: ...

    async def dma_write(self, iova: int, data: bytes) -> None: ...


class FeatureOperation(enum.IntFlag):
    """Operation bits of VFIO_USER_DEVICE_FEATURE, as they stand in its flags."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class Device(Protocol):
    """A PCI device as a session serves it.  See the module head for who may call what, when.

    The life of a session: `serve` starts in a task of its own; the other calls follow as the
    client commands; `work` comes after every batch of commands; at the end `serve` is cancelled,
    and `release` gives back every fd and mapping and quiets the device.
    """

    def device_info(self) -> DeviceInfo: ...

    def region_info(self, index: int) -> RegionInfo:
        """Region `index` < num_regions; a region that is absent has size 0 and no flags."""
        ...

    def irq_info(self, index: int) -> IrqInfo:
        """Interrupt `index` < num_irqs; one that is absent has count 0 and no flags."""
        ...

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Exactly `count` ≥ 1 bytes, inside the region."""
        ...

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        """Write 1 or more bytes, inside the region; `data` is valid only during the call."""
        ...

    async def set_irqs(self, request: IrqRequest) -> None: ...

    async def dma_map(self, mapping: DmaMapping) -> None:
        """Raises ClientError: EEXIST on overlap, ENOSPC beyond the limit, EINVAL, EACCES, …"""
        ...

    async def dma_unmap(self, iova: int, size: int) -> None:
        """Drop every mapping that lies inside the range, none being an error.

        When it returns, the device holds no reference to that memory.  EINVAL for a range that
        would split a mapping.  0, 2**64 drops everything.
        """
        ...

    async def reset(self, cause: ResetCause) -> None: ...

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        """VFIO_USER_DEVICE_FEATURE: the data of the reply.  ENOTTY for an unknown feature."""
        ...

    async def migration_read(self, count: int) -> bytes | memoryview:
        """Up to `count` bytes of device state; fewer means that no more is there now.

        They must not change any more.
        """
        ...

    async def migration_write(self, data: bytes | memoryview) -> None: ...

    async def precopy_info(self) -> tuple[int, int]:
        """Bytes of device state to read in PRE_COPY: of the first image, and of later ones."""
        ...

    def work(self) -> None:
        """Do the work that commands since the last call gave rise to (queues that were kicked).

        Does not wait; called once after each batch of commands, so that many cost one pass.
        """
        ...

    async def serve(self, memory: RemoteMemory) -> None:
        """Run the device for one session until cancelled: packets in, work that must wait."""
        ...

    async def release(self) -> None:
        """The session is over: stop, close every fd and mapping of it, keep the rest."""
        ...


class WithoutMigration:
    """How a `Device` that does not migrate answers who asks it to."""

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        raise ClientError(errno.ENOTTY, f"device feature {index} is not offered")

    async def migration_read(self, count: int) -> bytes | memoryview:
        raise ClientError(errno.EINVAL, "migration data: this device does not offer migration")

    async def migration_write(self, data: bytes | memoryview) -> None:
        raise ClientError(errno.EINVAL, "migration data: this device does not offer migration")

    async def precopy_info(self) -> tuple[int, int]:
        raise ClientError(errno.EINVAL, "precopy info: this device does not offer migration")


U64_END: Final = 1 << 64
"""One past the last IOVA; `Device.dma_unmap` (0, U64_END) drops everything."""
