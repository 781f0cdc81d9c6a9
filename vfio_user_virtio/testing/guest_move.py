"""A guest that moves between servers while its driver works: what a VMM does beside the device.

Why: `Migration` moves the device, and a device that has moved proves little without a driver whose
rings, buffers and interrupts go on where they were.  `MovableGuest` is a VMM for drivers of this
package.  Its memory is copied (`MovableRam`): once, then the pages that the source reports as
written (DMA logging) while it runs, and a last time when it has stopped.  After that the copy has
to be exact, and a stopped device must not write any more: both are checked each time.

    async with connect("a.sock", memory=memory_a) as a, connect("b.sock", memory=memory_b) as b:
        here, there = Place(a, memory_a), Place(b, memory_b)
        await here.map()
        await there.map()
        guest = await MovableGuest.open(here, ram)
        driver = NetDriver(guest.pci, guest.ram)
        await driver.start()
        …
        await guest.move_to(there)

The driver is told nothing.  While neither device runs its register accesses wait, as those of a
virtual processor that is not running; its memory it may go on using, until it waits for something.
Its eventfds are the same at the new place, taken from the old one.

Of a device that does not run nothing is asked but its migration states and data, and dirty pages:
some servers refuse anything else then (libvfio-user).  So its registers are read before it stops,
and it keeps its eventfds if it will not let go of them.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE (DMA logging), Device Migration.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import attrs
import trio

from vfio_user_virtio.device import FeatureOperation, LoggingReport, LoggingStart
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.protocol.dma_logging import (
    decode_logging_report_reply_untrusted,
    encode_logging_report_request,
    encode_logging_start,
    logging_report_reply_size,
)
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.testing.driver_queue import DeviceBroke
from vfio_user_virtio.testing.virtio_pci import CAP_MSIX, COMMAND, VirtioPci
from vfio_user_virtio.transport.device_migration import Migration

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.device import IrqRequest
    from vfio_user_virtio.testing.guest_ram import GuestRam
    from vfio_user_virtio.testing.movable_ram import MovableRam
    from vfio_user_virtio.testing.virtio_pci import PciClient
    from vfio_user_virtio.transport.client import Client


@attrs.define(eq=False)
class Place:
    """A server that a guest can be on: a client of it, and the memory that it sees as the guest's.

    `memory` is used whole, nothing is allocated from it.  It is also what the client should serve
    (`connect(…, memory=…)`).
    """

    client: Client
    memory: GuestRam
    _step: int | None = attrs.field(default=None, init=False)
    """How large the mappings are."""

    async def map(self, *, remote: bool = False, step: int | None = None) -> None:
        """Let the server see the memory; see `GuestRam.mappings`.  Raises RemoteError."""
        self._step = step
        await self.memory.map(self.client, remote=remote, step=step)

    # --- dirty tracking ------------------------------------------------------------------------

    async def start_logging(self) -> None:
        """Let the device note what it writes.  Raises RemoteError."""
        data = encode_logging_start(LoggingStart(PAGE_SIZE))
        await self.client.feature(Feature.DMA_LOGGING_START, FeatureOperation.SET, data)

    async def written(self) -> set[int]:
        """Which pages, from 0, the device has written since the last call.  Raises RemoteError.

        Asks for each mapping by itself, since some servers take no larger range (libvfio-user).
        """
        pages = set()
        for mapping in self.memory.mappings(step=self._step):
            first = (mapping.iova - self.memory.iova) // PAGE_SIZE
            written = await self._report(LoggingReport(mapping.iova, mapping.size, PAGE_SIZE))
            pages |= {first + bit for bit in range(written.bit_length()) if written >> bit & 1}
        return pages

    async def _report(self, asked: LoggingReport) -> int:
        """The bitmap as a number."""
        reply = await self.client.feature(
            Feature.DMA_LOGGING_REPORT,
            FeatureOperation.GET,
            encode_logging_report_request(asked),
            room=logging_report_reply_size(asked),
        )
        return int.from_bytes(decode_logging_report_reply_untrusted(reply, asked), "little")

    async def stop_logging(self) -> None:
        await self.client.feature(Feature.DMA_LOGGING_STOP, FeatureOperation.SET)


class GuestClient:
    """A client as a guest sees it: accesses wait while the guest does not run.  A `PciClient`."""

    def __init__(self, client: PciClient) -> None:
        self._client = client
        self._runs = trio.Event()
        self._runs.set()
        self._under_way = 0
        self._quiet = trio.Event()

    @property
    def running(self) -> bool:
        """Whether accesses may begin."""
        return self._runs.is_set()

    async def pause(self) -> None:
        """Let no access begin, and wait for those that have."""
        if self.running:
            self._runs = trio.Event()
        while self._under_way:
            self._quiet = trio.Event()
            await self._quiet.wait()

    def go_on(self, client: PciClient) -> None:
        """Let what waits, and what comes, go to `client`."""
        self._client = client
        self._runs.set()

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        client = await self._begin()
        try:
            return await client.region_read(index, offset, count)
        finally:
            self._end()

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        client = await self._begin()
        try:
            await client.region_write(index, offset, data, no_reply=no_reply)
        finally:
            self._end()

    async def set_irqs(self, request: IrqRequest) -> None:
        client = await self._begin()
        try:
            await client.set_irqs(request)
        finally:
            self._end()

    async def _begin(self) -> PciClient:
        while not self.running:
            await self._runs.wait()
        self._under_way += 1
        return self._client

    def _end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._quiet.set()


class MovableGuest:
    """The machine of a guest at `place`, with memory `ram`; drivers work on `pci` and `ram`.

    Made by `open`.
    """

    def __init__(self, place: Place, ram: MovableRam, client: GuestClient, pci: VirtioPci) -> None:
        self.place = place
        self.ram = ram
        self.client = client
        self.pci = pci

    @classmethod
    async def open(cls, place: Place, ram: MovableRam) -> MovableGuest:
        """A guest whose memory is that of `place`.  Raises DeviceBroke as `VirtioPci.open`."""
        ram.move_into(place.memory)
        client = GuestClient(place.client)
        return cls(place, ram, client, await VirtioPci.open(client))

    async def move_to(
        self,
        target: Place,
        *,
        precopy: bool = True,
        rounds: int = 1,
        while_stopped: Callable[[], None] = lambda: None,
    ) -> Migration:
        """Migrate to `target`, on which no guest is; the migration, for its figures.

        `precopy`: as `Migration` has it.  `rounds`: how often to copy what was written before the
        guest is paused.  `while_stopped` is called when neither device runs, before the memory is
        copied for the last time; it may be part of the guest.

        The source is in STOP in the end, and without eventfds if it lets go of them in that state.
        A move that fails or is cancelled leaves the guest where it was, unless the device cannot go
        on there: then it is paused for good.  Raises what `Migration.run` does; DeviceBroke if the
        source wrote what it did not report, or after it has stopped, and if the devices' structures
        lie elsewhere.
        """
        source = self.place
        move = _Move(self, target, rounds, while_stopped)
        migration = Migration(source.client, target.client, precopy=precopy, guest=move)
        await source.start_logging()
        try:
            self.ram.copy_to(target.memory, range(self.ram.size // PAGE_SIZE))
            self.ram.copy_to(target.memory, await source.written())
            await migration.run()
        finally:
            if migration.target_runs:
                self.place = target
            if migration.target_runs or migration.source_state == MigrationState.RUNNING:
                self.client.go_on(self.place.client)
            with trio.CancelScope(shield=True):
                left = source if migration.target_runs else target
                if not left.client.lost.is_set():
                    with contextlib.suppress(RemoteError):
                        await self.pci.disarm(left.client)
                if not source.client.lost.is_set():
                    await source.stop_logging()
        move.check_source()
        return migration


class _Move:
    """One move of a guest, as the `GuestMachine` of its migration."""

    def __init__(
        self,
        guest: MovableGuest,
        target: Place,
        rounds: int,
        while_stopped: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._source = guest.place
        self._target = target
        self._rounds = rounds
        self._while_stopped = while_stopped
        self._registers: dict[int, int] = {}
        """By offset in configuration space: what the guest has set, and no device carries along."""
        self._left: bytes | None = None
        """The memory of the source as it was last, if the guest has left it."""

    async def pause(self) -> None:
        for _ in range(self._rounds):
            self._guest.ram.copy_to(self._target.memory, await self._source.written())
        await self._guest.client.pause()
        pci = self._guest.pci
        here = VirtioPci(self._source.client, pci.pci_capabilities, pci.capabilities)
        offsets = [COMMAND]
        if CAP_MSIX in pci.pci_capabilities:
            offsets.append(pci.pci_capabilities[CAP_MSIX] + 2)  # Message Control
        self._registers = {offset: await here.config_read(offset, 2) for offset in offsets}

    async def carry(self) -> None:
        ram, source, target = self._guest.ram, self._source.memory, self._target.memory
        self._while_stopped()
        written = await self._source.written()
        await self._set_up_target()
        # from here on without waiting: the guest's own memory must not change meanwhile
        ram.copy_to(target, written)
        if kept := ram.difference(target):
            addresses = ", ".join(f"{ram.iova + page * PAGE_SIZE:#x}" for page in kept[:8])
            raise DeviceBroke(f"{len(kept)} pages were written and not reported: {addresses}")
        self._left = bytes(source.view(source.iova, source.size))
        ram.move_into(target)

    async def carry_back(self) -> None:
        if self._left is not None:
            self._left = None
            self._guest.ram.copy_to(self._source.memory)
            self._guest.ram.move_into(self._source.memory)

    def check_source(self) -> None:
        """Raises DeviceBroke if the source has gone on writing."""
        memory = self._source.memory
        if self._left is not None and self._left != bytes(memory.view(memory.iova, memory.size)):
            raise DeviceBroke("the source wrote to guest memory after it had stopped")

    async def _set_up_target(self) -> None:
        """Restore what is neither the device's state nor memory: COMMAND, MSI-X, eventfds."""
        pci, target = self._guest.pci, self._target.client
        there = await VirtioPci.open(target)
        if (there.pci_capabilities, there.capabilities) != (pci.pci_capabilities, pci.capabilities):
            raise DeviceBroke("the structures of the target's device lie elsewhere")
        for offset, value in self._registers.items():
            await there.config_write(offset, value, 2)
        await pci.arm(target)
