"""A physical function as a session serves it: a VF, or any PCI function bound to vfio-pci.

Everything is the kernel's: registers, configuration space, interrupts, memory.  What is here is how
one client after another gets at them, and gets nothing else.  The path of a packet does not come by
here at all: the guest rings doorbells in a BAR that is mapped into the client, the device reads and
writes guest memory by the IOMMU, and interrupts signal the client's own eventfds.

What is mapped into a client is mapped by the device's own descriptor, because the kernel has no
other for it.  Who has that can also reset the function, change its interrupts and read its
configuration, though no memory beyond what is mapped for it.  Whoever wants a client that has only
the socket turns mapping off (`map_bars`): then each doorbell is a message.

Its life: opened once, when the program starts, so that what is wrong is told then; given to one
client after another.  At the end of each session interrupts are turned off, the function may no
longer master the bus and is reset, and then its memory is unmapped: nothing of one client is left
for the next, and nothing moves meanwhile.

The kernel can want the device back: it is being unbound, unplugged, or its PF gives its VFs up.
`watch` hears of it, closes the device, and ends the session (`serve` raises); from then on every
call answers ENODEV.  A client that has BARs mapped keeps the device open for the kernel until it
goes, too.

Rejected: opening at the start of each session.  The first client would learn what the administrator
should have learnt, and a migration's target needs the function before its client runs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.backends.vfio.areas import mappable_areas
from vfio_user_virtio.backends.vfio.config_facts import CONFIG_SIZE, read_config_facts
from vfio_user_virtio.backends.vfio.dma import ClientMemory
from vfio_user_virtio.backends.vfio.dma_logging import VfLogging
from vfio_user_virtio.backends.vfio.interrupts import ClientInterrupts
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.operator import VfOperator
from vfio_user_virtio.backends.vfio.replay import kick_queues
from vfio_user_virtio.device import (
    DeviceFlags,
    DeviceInfo,
    RegionFlags,
    RegionInfo,
    SparseArea,
    VfioIrq,
    VfioRegion,
    WithoutMigration,
)
from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.limits import INLINE_REGISTER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_user_virtio.backends.vfio.areas import Hole
    from vfio_user_virtio.backends.vfio.opening import OpenedFunction
    from vfio_user_virtio.device import (
        DmaMapping,
        IrqInfo,
        IrqRequest,
        RemoteMemory,
        ResetCause,
    )

_log: Final = logging.getLogger(__name__)

COMMAND: Final = 0x04
BUS_MASTER: Final = 1 << 2

_NUM_REGIONS: Final = VfioRegion.VGA + 1
_ABSENT: Final = RegionInfo(0, RegionFlags(0))


class VfFunction(WithoutMigration):
    """The function that `opened` is, which this object owns; whoever owns the PF adds migration
    (`MigratableDevice`).

    `map_bars`: whether clients may map what can be mapped; `trapped` is left out of that, beside
    the MSI-X table.  `sees_memory`: clients' memory is mapped here too, for who moves guests.
    Raises HostError for a function whose configuration space makes no sense.
    """

    def __init__(
        self,
        opened: OpenedFunction,
        *,
        map_bars: bool = True,
        trapped: Sequence[Hole] = (),
        sees_memory: bool = False,
    ) -> None:
        device = opened.device
        self.name: Final = device.name
        self._opened: Final = opened
        self._device: Final = device
        self._facts = read_config_facts(device.read(VfioRegion.CONFIG, 0, CONFIG_SIZE), self.name)
        holes = (*self._facts.holes, *trapped)
        self._regions: Final = tuple(
            self._region(index, holes if map_bars else None)
            for index in range(min(_NUM_REGIONS, len(device.regions)))
        )
        self._interrupts: Final = ClientInterrupts(device)
        self.memory: Final = ClientMemory(opened.space, self.name)
        self.logging: Final = VfLogging(self.name, self.memory, opened.space)
        self.operator: Final = VfOperator(
            self.name, self.memory, self.replay, sees_memory=sees_memory
        )
        self._in_session = False
        """Something may be under way on the descriptors: whoever releases the device closes it."""
        self._gone: str | None = None
        self._goes: Final = trio.Event()

    def _region(self, index: int, holes: Sequence[Hole] | None) -> RegionInfo:
        region = self._device.regions[index]
        if not region.size:
            return _ABSENT
        areas: tuple[SparseArea, ...] = ()
        if holes is not None and index <= VfioRegion.BAR5:
            areas = mappable_areas(region, [hole for hole in holes if hole.region == index])
        flags = region.flags & ~RegionFlags.MMAP
        if not areas:
            return RegionInfo(region.size, flags)
        whole = areas == (SparseArea(0, region.size),)
        return RegionInfo(
            region.size,
            flags | RegionFlags.MMAP,
            fd=self._device.fd,
            fd_offset=region.offset,
            areas=() if whole else areas,
        )

    # --- what the device is --------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        flags = DeviceFlags.PCI | (DeviceFlags.RESET if self._device.can_reset else DeviceFlags(0))
        return DeviceInfo(flags, _NUM_REGIONS, len(VfioIrq))

    def region_info(self, index: int) -> RegionInfo:
        if index >= len(self._regions):
            return _ABSENT
        region = self._regions[index]
        if self._gone is not None:  # its descriptor is closed, and the number may be another's
            return RegionInfo(region.size, region.flags & ~RegionFlags.MMAP)
        return region

    def irq_info(self, index: int) -> IrqInfo:
        return self._interrupts.info(index)

    # --- registers -----------------------------------------------------------------------------

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        with self._answering():
            if count > INLINE_REGISTER_BYTES:
                return await trio.to_thread.run_sync(self._device.read, index, offset, count)
            return self._device.read(index, offset, count)

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        with self._answering():
            resets = index == VfioRegion.CONFIG and self._facts.may_reset(offset, len(data))
            if resets or len(data) > INLINE_REGISTER_BYTES:
                await trio.to_thread.run_sync(self._device.write, index, offset, bytes(data))
            else:
                self._device.write(index, offset, data)

    # --- interrupts, memory, reset -------------------------------------------------------------

    async def set_irqs(self, request: IrqRequest) -> None:
        with self._answering(request.eventfds or ()):
            self._interrupts.set_irqs(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        with (
            self._answering(() if mapping.fd is None else (mapping.fd,)),
            self.operator.mapping(mapping),
        ):
            await self.memory.map_untrusted(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self.memory.unmap_untrusted(iova, size)
        self.operator.unmapped(iova, size)

    async def reset(self, cause: ResetCause) -> None:
        _log.debug("%s: reset: %s", self.name, cause.value)
        with self._answering():
            await trio.to_thread.run_sync(self._device.reset)

    def replay(self) -> None:
        """Kick each queue and send each interrupt once, as after a migration some may be missing.

        Its guest must not be setting it up meanwhile.  Raises ClientError.
        """
        with self._translating():
            kicked = kick_queues(self._device)
            self._interrupts.inject_all()
        _log.debug("%s: %d queues kicked, interrupts sent", self.name, kicked)

    # --- a session -----------------------------------------------------------------------------

    def work(self) -> None:
        """Nothing: no packet comes by here."""

    async def serve(self, memory: RemoteMemory) -> None:
        """Raises HostError when the kernel wants the device back."""
        self.operator.session_begins(memory)
        await self._goes.wait()
        raise HostError(str(self._gone), exit_code=os.EX_UNAVAILABLE)

    async def release(self) -> None:
        try:
            if not self._device.closed:
                await trio.to_thread.run_sync(self._quiet)
        finally:
            self._in_session = False
            self.operator.session_ends()
            if self._gone is not None:
                self._opened.close()

    def _quiet(self) -> None:
        """Undo all that a client has done.  Blocks; what fails is told, and the rest is done."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("turning interrupts off", self._interrupts.close),
            ("taking bus mastering away", self._master_no_more),
            ("resetting it", self._reset_if_possible),
            ("stopping DMA logging", self.logging.stop_logging),
            ("unmapping its memory", self.memory.clear),
        ]
        for what, step in steps:
            try:
                step()
            except HostError as error:
                level = logging.ERROR if self._gone is None else logging.DEBUG
                _log.log(level, "%s: %s after a session failed: %s", self.name, what, error)

    def _master_no_more(self) -> None:
        command = int.from_bytes(self._device.read(VfioRegion.CONFIG, COMMAND, 2), "little")
        data = (command & ~BUS_MASTER).to_bytes(2, "little")
        self._device.write(VfioRegion.CONFIG, COMMAND, data)

    def _reset_if_possible(self) -> None:
        if self._device.can_reset:
            self._device.reset()

    # --- the end -------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Wait until the kernel wants the device back, and give it back; then return.

        To run beside everything else, from opening to `close`.
        """
        eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            if self._device.irqs[VfioIrq.REQ].count:
                self._device.set_eventfds(VfioIrq.REQ, 0, (eventfd,))
            await trio.lowlevel.wait_readable(eventfd)
        finally:
            os.close(eventfd)
        self._gone = (
            f"{self.name}: the kernel wants the device back (it is being unbound or unplugged, or "
            "its PF gives its VFs up); bind it to vfio-pci and start the program again"
        )
        _log.error("%s", self._gone)
        self._interrupts.signal_request()
        self._goes.set()
        if not self._in_session:
            self._opened.close()

    def close(self) -> None:
        """Give the device back, which resets it.  No session may be running."""
        if not self._device.closed:
            self._opened.close()

    @contextlib.contextmanager
    def _answering(self, fds: Sequence[int] = ()) -> Iterator[None]:
        """The kernel's refusals as answers to the client; `fds` are closed if nothing is done."""
        if self._gone is not None:
            for fd in fds:
                os.close(fd)
        with self._translating():
            self._in_session = True
            yield

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """ENODEV once the device is gone, and the kernel's refusals: as ClientError."""
        if self._gone is not None:
            raise ClientError(errno.ENODEV, self._gone)
        try:
            yield
        except KernelRefusal as error:
            raise ClientError(error.errno, str(error)) from error
