"""A device with migration: any `Device`, and the `MemberMigration` of the member that it is.

What a client asks of a device feature or of the migration stream is answered here; all else is
handed on.  So the software member and a physical VF migrate by the same code, and neither knows of
the other's.

Features (vfio-user, VFIO_USER_DEVICE_FEATURE): MIGRATION and MIG_DATA_SIZE can be got,
MIG_DEVICE_STATE got and set, DMA_LOGGING_START and _STOP set, DMA_LOGGING_REPORT got.  Each can be
probed for that.  Any other answers ENOTTY, which is what newer clients take for "not there".
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
from typing import TYPE_CHECKING, Final, Protocol

import trio

from vfio_user_virtio.device import FeatureOperation, ResetCause, VfioRegion
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.protocol.dma_logging import (
    decode_logging_report_untrusted,
    decode_logging_start_untrusted,
    encode_logging_report_reply,
)
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    MigrationState,
    decode_device_state_request_untrusted,
    encode_data_size,
    encode_device_state,
    encode_migration_flags,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from vfio_user_virtio.device import (
        Device,
        DeviceInfo,
        DmaMapping,
        IrqInfo,
        IrqRequest,
        LoggingReport,
        LoggingStart,
        RegionInfo,
        RemoteMemory,
    )
    from vfio_user_virtio.migration.member_migration import MemberMigration

_log: Final = logging.getLogger(__name__)

_GET: Final = FeatureOperation.GET
_SET: Final = FeatureOperation.SET


class Holder(enum.Enum):
    """Who migrates a device, or has its writes logged."""

    NOBODY = "nobody"
    CLIENT = "client"
    CONTROL = "control"


class DmaLogging(Protocol):
    """A device that can tell which guest memory it wrote.  Raises ClientError.

    `exact`: it knows pages; otherwise all that it may write counts as written, each time.
    """

    @property
    def exact(self) -> bool: ...

    def start_logging(self, start: LoggingStart) -> None: ...

    def stop_logging(self) -> None: ...

    def report_logging(self, report: LoggingReport) -> bytes:
        """The bitmap of pages written since the last report of them."""
        ...


class MigratableDevice:
    """`device`, which is migrated by `migration`; `logging` tells what it wrote, if it can.

    `holder`, `log_holder`: who does it.  It begins with the first state other than RUNNING, or the
    start of logging, and others are refused (EBUSY) until its end.
    """

    def __init__(
        self, device: Device, migration: MemberMigration, logging: DmaLogging | None
    ) -> None:
        self.migration = migration
        self.inner: Final = device
        self.holder = Holder.NOBODY
        self.log_holder = Holder.NOBODY
        self._device = device
        self._logging = logging
        self._lock = trio.Lock()

    @contextlib.asynccontextmanager
    async def in_hand(self, who: Holder) -> AsyncIterator[MemberMigration]:
        """The migration, for one request of `who`; what else has a say in it waits meanwhile.

        Raises ClientError EBUSY if somebody else has it in hand.
        """
        async with self._alone():
            if self.holder not in (Holder.NOBODY, who):
                raise ClientError(
                    errno.EBUSY,
                    f"the device is in {self.migration.state.name} by its {self.holder.value}'s "
                    "doing; wait until that is over",
                )
            try:
                with self.migration.request():
                    yield self.migration
            finally:
                idle = self.migration.state is MigrationState.RUNNING
                self.holder = Holder.NOBODY if idle else who

    def logging_in_hand(self, who: Holder) -> DmaLogging:
        """The log, for `who`.

        Raises ClientError: EBUSY if somebody else has it in hand, ENOTTY if there is none.
        """
        if self._logging is None:
            raise ClientError(errno.ENOTTY, "this device does not log what it writes")
        if self.log_holder not in (Holder.NOBODY, who):
            raise ClientError(
                errno.EBUSY, f"DMA logging was started by the device's {self.log_holder.value}"
            )
        return self._logging

    def start_logging(self, who: Holder, start: LoggingStart) -> None:
        """Raises ClientError, as `logging_in_hand` and `DmaLogging`."""
        self.logging_in_hand(who).start_logging(start)
        self.log_holder = who

    def stop_logging(self, who: Holder) -> None:
        """Raises ClientError, as `logging_in_hand`."""
        self.logging_in_hand(who).stop_logging()
        self.log_holder = Holder.NOBODY

    @property
    def can_log(self) -> bool:
        return self._logging is not None

    @property
    def logs_pages(self) -> bool:
        """Whether the log knows pages (`DmaLogging.exact`)."""
        return self._logging is not None and self._logging.exact

    async def give_up(self) -> None:
        """End what is going on: the device runs, and one that is half loaded is reset first."""
        async with self._alone():
            await self._give_up()

    async def _give_up(self) -> None:
        try:
            if self.migration.half_loaded:
                await self._forget_stream()
            await self.migration.client_is_gone()
        finally:
            self.holder = Holder.NOBODY

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Without a turn for others if nobody holds the lock."""
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    # --- features ------------------------------------------------------------------------------

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        handlers = _FEATURES.get(index)
        if handlers is None or (self._logging is None and index in _LOGGING):
            raise ClientError(errno.ENOTTY, f"device feature {index} is not offered")
        for wanted in (_GET, _SET):
            if operation & wanted and wanted not in handlers:
                raise ClientError(errno.EINVAL, f"device feature {index} has no {wanted.name}")
        if operation & FeatureOperation.PROBE:
            return b""
        return await handlers[_GET if operation & _GET else _SET](self, data)

    async def _get_flags(self, data: bytes) -> bytes:
        return encode_migration_flags(self.migration.options)

    async def _get_state(self, data: bytes) -> bytes:
        return encode_device_state(self.migration.state)

    async def _set_state(self, data: bytes) -> bytes:
        wanted = decode_device_state_request_untrusted(data)
        async with self.in_hand(Holder.CLIENT) as migration:
            await migration.set_state(wanted)
            return encode_device_state(migration.state)

    async def _get_data_size(self, data: bytes) -> bytes:
        async with self._alone():
            with self.migration.request():
                return encode_data_size(await self.migration.data_size())

    async def _start_logging(self, data: bytes) -> bytes:
        self.start_logging(Holder.CLIENT, decode_logging_start_untrusted(data))
        return data

    async def _stop_logging(self, data: bytes) -> bytes:
        self.stop_logging(Holder.CLIENT)
        return b""

    async def _report_logging(self, data: bytes) -> bytes:
        report = decode_logging_report_untrusted(data)
        bitmap = self.logging_in_hand(Holder.CLIENT).report_logging(report)
        return encode_logging_report_reply(report, bitmap)

    async def migration_read(self, count: int) -> bytes | memoryview:
        async with self.in_hand(Holder.CLIENT) as migration:
            return migration.read(count)

    async def migration_write(self, data: bytes | memoryview) -> None:
        async with self.in_hand(Holder.CLIENT) as migration:
            await migration.write(data)

    async def precopy_info(self) -> tuple[int, int]:
        async with self.in_hand(Holder.CLIENT) as migration:
            info = await migration.precopy_info()
        return info.initial_bytes, info.dirty_bytes

    # --- what has a say in the migration -------------------------------------------------------

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        if index != VfioRegion.CONFIG:
            await self._device.region_write(index, offset, data)
            return
        async with self._alone():
            await self._device.region_write(index, offset, data)
            with self.migration.request():
                await self.migration.function_was_reset()

    async def reset(self, cause: ResetCause) -> None:
        async with self._alone():
            await self._device.reset(cause)
            with self.migration.request():
                await self.migration.device_was_reset()
            self.holder = Holder.NOBODY

    async def release(self) -> None:
        try:
            await self.give_up()
        finally:
            if self._logging is not None:
                self._logging.stop_logging()
            self.log_holder = Holder.NOBODY
            await self._device.release()

    async def _forget_stream(self) -> None:
        """The client has gone before the device ran with what came: as another device, it would
        write to that one's memory, and tell the network that its guest is here."""
        try:
            await self._device.reset(ResetCause.CLIENT)
        except ClientError as error:
            _log.warning("the device cannot be reset after half a migration: %s", error)

    # --- all else ------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        return self._device.device_info()

    def region_info(self, index: int) -> RegionInfo:
        return self._device.region_info(index)

    def irq_info(self, index: int) -> IrqInfo:
        return self._device.irq_info(index)

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        return await self._device.region_read(index, offset, count)

    async def set_irqs(self, request: IrqRequest) -> None:
        await self._device.set_irqs(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        await self._device.dma_map(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self._device.dma_unmap(iova, size)

    def work(self) -> None:
        self._device.work()

    async def serve(self, memory: RemoteMemory) -> None:
        await self._device.serve(memory)


_FEATURES: Final[
    Mapping[
        int,
        Mapping[FeatureOperation, Callable[[MigratableDevice, bytes], Awaitable[bytes]]],
    ]
] = {
    Feature.MIGRATION: {_GET: MigratableDevice._get_flags},
    Feature.MIG_DEVICE_STATE: {
        _GET: MigratableDevice._get_state,
        _SET: MigratableDevice._set_state,
    },
    Feature.MIG_DATA_SIZE: {_GET: MigratableDevice._get_data_size},
    Feature.DMA_LOGGING_START: {_SET: MigratableDevice._start_logging},
    Feature.DMA_LOGGING_STOP: {_SET: MigratableDevice._stop_logging},
    Feature.DMA_LOGGING_REPORT: {_GET: MigratableDevice._report_logging},
}
_LOGGING: Final = frozenset(
    {Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT}
)
