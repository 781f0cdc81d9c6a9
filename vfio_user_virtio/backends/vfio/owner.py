"""The owner that we drive: a PF brought up by us, whose administration virtqueue carries commands
for its VFs.

It is the `AdminQueue` of those who migrate the VFs, who know nothing of what is behind it; a broker
that holds the PF for several daemons would pass encoded commands on to one of these.  Modelled on
Linux's ``virtio_pci_modern.c``, with what that lacks: commands may be given up in time, which harms
nobody, and a device that asks for a reset is heard.

Life: `start` resets the device and brings it up, `run` hears its interrupts, `recover` does all of
it again after a failure, `close` leaves the device reset.  A reset of the PF, at start as well,
takes all objects of its VFs with it, and what the driver has negotiated: whoever uses this queue
then has to discover the owner anew.  So nothing stale is left by a process that has crashed, unless
the PF was held by another: for that there is `destroy_stale_objects`.

Opening and closing a PF through VFIO resets it too, which is why exactly one process holds it, for
as long as any VF of it is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.admin_ring import AdminRing
from vfio_user_virtio.backends.vfio.owner_transport import GONE, OwnerTransport, Register
from vfio_user_virtio.device import DmaAccess, DmaMapping, IrqAction, IrqRequest, VfioIrq
from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.migration.admin_client import AdminError
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import feature_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from vfio_user_virtio.backends.vfio.owner_access import FunctionAccess
    from vfio_user_virtio.migration.admin_client import AdminClient

_log: Final = logging.getLogger(__name__)

OWNER_IOVA: Final = 1 << 20
"""Where the device finds the owner's memory: low enough for any IOMMU, below all MSI windows."""
CONFIG_VECTOR: Final = 0
QUEUE_VECTOR: Final = 1
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class VfioOwner:
    """The PF behind `access`, called `name` in messages.  An `AdminQueue`.

    Its memory is `ADMIN_MEMORY` bytes at `iova` of an address space that nobody else has.
    """

    def __init__(
        self,
        access: FunctionAccess,
        name: str,
        *,
        iova: int = OWNER_IOVA,
        allow_untranslated: bool = False,
    ) -> None:
        self.name: Final = name
        self._access = access
        self._iova = iova
        self._allow_untranslated = allow_untranslated
        self._transport = OwnerTransport(access, name)
        self._fd = os.memfd_create("owner", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, limits.ADMIN_MEMORY)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)  # a server that maps it insists
        self._memory = memoryview(mmap.mmap(self._fd, limits.ADMIN_MEMORY))
        self._config_eventfd, self._queue_eventfd, self._error_eventfd, self._request_eventfd = (
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)
        )
        self._queue_index = 0
        self._ring: AdminRing | None = None
        self._failure: HostError | None = HostError(f"{name}: the owner has not been started")
        self._closed = False
        self._failed = trio.Event()
        self._hearing = trio.CancelScope()
        self._deaf = trio.Event()
        self._deaf.set()
        self.lost = trio.Event()
        """Set when the device is to be closed: it has gone, or the host wants it back."""

    @property
    def features(self) -> int:
        """What was negotiated."""
        return self._transport.features

    @property
    def failure(self) -> HostError | None:
        """Why commands fail, or None while they do not; `recover` may mend it."""
        return self._failure

    async def until_failure(self) -> HostError:
        """Why commands fail, as soon as they do; at once if they do now."""
        while self._failure is None:
            await self._failed.wait()
        return self._failure

    @property
    def outstanding(self) -> int:
        """Commands that the device has not answered, also those that nobody waits for."""
        return 0 if self._ring is None else self._ring.outstanding

    async def execute(self, readable: bytes, writable: int) -> bytes:
        """One encoded command; what the device wrote.

        Raises HostError when the device is gone, broken or in need of a reset, AdminError for a
        command that does not fit.  A call that is cancelled leaves its command to the device.
        """
        if self._failure is not None or self._ring is None:
            assert self._failure is not None
            raise self._failure
        try:
            return await self._ring.execute(readable, writable)
        except trio.Cancelled:
            if not self._closed:
                self._look_at_status()
            raise

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reset the device and bring it up, to DRIVER_OK.  Raises HostError."""
        await self._transport.open()
        await self._transport.reset()
        with self._naming():
            mapping = DmaMapping(
                self._iova, len(self._memory), DmaAccess.READ | DmaAccess.WRITE, self._fd
            )
            await self._access.dma_map(mapping)
        await self._take_interrupts()
        await self._bring_up()

    async def run(self) -> None:
        """Hear the device's interrupts, until cancelled or closed; once."""
        self._deaf = trio.Event()
        try:
            with self._hearing:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear_queue)
                    nursery.start_soon(self._hear_config)
                    nursery.start_soon(self._hear_loss, self._error_eventfd, "it has failed")
                    nursery.start_soon(
                        self._hear_loss, self._request_eventfd, "the host wants it back"
                    )
        finally:
            self._deaf.set()

    async def recover(self) -> None:
        """Reset the device and bring it up again; every command under way fails.

        Raises HostError if it does not come back.
        """
        self._fail("it is being reset")
        try:
            await self._recover()
        except HostError as error:
            await self._check_status()
            self._fail(str(error))
            raise
        _log.info("%s: the owner is back; its objects and lists are gone", self.name)

    async def _recover(self) -> None:
        await self._transport.open()
        try:
            await self._transport.reset()
        except HostError as error:
            _log.warning("%s; resetting the whole function, with its VFs", error)
            with self._naming():
                await self._access.reset()
            await self._transport.open()
            await self._transport.reset()
        await self._take_interrupts()
        await self._bring_up()

    async def close(self) -> None:
        """Leave the device reset, and give everything back.  Every command under way fails.

        Idempotent.
        """
        if self._closed:
            return
        self._closed = True
        self._fail("the owner has been closed")
        self._hearing.cancel()
        with trio.CancelScope(shield=True):
            await self._deaf.wait()  # nobody may wait for an eventfd that is closed
            try:
                if self._transport.found:
                    with contextlib.suppress(HostError):
                        await self._transport.reset()
                with contextlib.suppress(HostError), self._naming():
                    await self._access.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, IrqAction.TRIGGER))
                with contextlib.suppress(HostError), self._naming():
                    await self._access.dma_unmap(self._iova, len(self._memory))
            finally:
                for fd in (
                    self._fd,
                    self._config_eventfd,
                    self._queue_eventfd,
                    self._error_eventfd,
                    self._request_eventfd,
                ):
                    os.close(fd)

    async def _bring_up(self) -> None:
        transport = self._transport
        await transport.negotiate(allow_untranslated=self._allow_untranslated)
        index, largest = await transport.admin_queue()
        size = min(largest, limits.ADMIN_RING_SIZE)
        self._queue_index = index
        ring = AdminRing(self._memory, self._iova, size, self._notify)
        await transport.set_config_vector(CONFIG_VECTOR)
        await transport.enable_queue(index, ring.addresses, QUEUE_VECTOR)
        await transport.driver_ok()
        self._ring, self._failure = ring, None
        await self._check_status()
        if self._failure is not None:
            raise self._failure
        names = " ".join(feature_names(transport.features))
        _log.info("%s: owned; %s; administration virtqueue %d", self.name, names, index)

    async def _take_interrupts(self) -> None:
        with self._naming():
            count = (await self._access.irq_info(VfioIrq.MSIX)).count
        if count <= QUEUE_VECTOR:
            raise self._transport.error(
                f"it has {count} MSI-X vectors; an owner needs {QUEUE_VECTOR + 1}"
            )
        await self._arm(VfioIrq.MSIX, self._config_eventfd, self._queue_eventfd)
        await self._transport.enable_msix()
        for index, eventfd in (
            (VfioIrq.ERR, self._error_eventfd),
            (VfioIrq.REQ, self._request_eventfd),
        ):
            with self._naming():
                present = (await self._access.irq_info(index)).count
            if present:
                await self._arm(index, eventfd)

    async def _arm(self, index: VfioIrq, *eventfds: int) -> None:
        request = IrqRequest(index, 0, len(eventfds), IrqAction.TRIGGER, eventfds=eventfds)
        with self._naming():
            await self._access.set_irqs(request)

    async def _notify(self) -> None:
        await self._transport.notify(self._queue_index)

    # --- what the device says ------------------------------------------------------------------

    async def _hear_queue(self) -> None:
        while True:
            await _hear(self._queue_eventfd)
            if self._ring is not None and self._failure is None:
                try:
                    self._ring.collect()
                except HostError as error:
                    self._fail(str(error))

    async def _hear_config(self) -> None:
        while True:
            await _hear(self._config_eventfd)
            if self._failure is None:
                await self._check_status()

    async def _hear_loss(self, eventfd: int, problem: str) -> None:
        await _hear(eventfd)
        self._lose(problem)

    def _lose(self, problem: str) -> None:
        self._fail(problem)
        self.lost.set()

    async def _check_status(self) -> None:
        """Fail if the device cannot go on.  No harm is done by looking too often."""
        try:
            status = await self._transport.read(Register.DEVICE_STATUS)
        except HostError as error:
            self._lose(str(error))
            return
        if status == GONE:
            self._lose("the device has gone")
        elif status & Status.DEVICE_NEEDS_RESET:
            self._fail("it has met an error and needs a reset (DEVICE_NEEDS_RESET)")
        elif not status & Status.DRIVER_OK:
            self._fail("somebody else has reset it")

    def _look_at_status(self) -> None:
        """Have the status looked at soon: a command was not answered in time."""
        os.eventfd_write(self._config_eventfd, 1)

    def _fail(self, problem: str) -> None:
        problem = problem.removeprefix(f"{self.name}: ")
        if self._failure is None and not self._closed:
            _log.warning("%s: no more commands: %s", self.name, problem)
        self._failure = HostError(f"{self.name}: {problem}")
        self._failed.set()
        self._failed = trio.Event()
        if self._ring is not None:
            self._ring.fail(self._failure)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (RemoteError, ConnectionLost, HostError) as error:
            raise HostError(f"{self.name}: {str(error).removeprefix(self.name + ': ')}") from error


@contextlib.asynccontextmanager
async def owned(
    access: FunctionAccess, name: str, *, iova: int = OWNER_IOVA, allow_untranslated: bool = False
) -> AsyncIterator[VfioOwner]:
    """The PF behind `access`, brought up, for the length of the block.  Raises HostError."""
    owner = VfioOwner(access, name, iova=iova, allow_untranslated=allow_untranslated)
    failure: Exception | None = None
    try:
        await owner.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner.run)
            try:
                yield owner
            except Exception as error:  # the caller's, to leave here as it came: not in a group
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        await owner.close()
    if failure is not None:
        raise failure


async def destroy_stale_objects(
    client: AdminClient, member_ids: Iterable[int], object_ids: Iterable[int]
) -> int:
    """Destroy whatever an earlier user of an owner that was not reset has left; how many there
    were.  Raises HostError, and AdminError for what cannot be destroyed."""
    found = 0
    for member in member_ids:
        for object_id in object_ids:
            try:
                await client.execute(commands.object_destroy(member, object_id))
            except AdminError as error:
                if error.errno != errno.ENXIO:
                    raise
            else:
                found += 1
    return found


async def _hear(eventfd: int) -> None:
    """Wait until it is signalled, and clear it."""
    await trio.lowlevel.wait_readable(eventfd)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
