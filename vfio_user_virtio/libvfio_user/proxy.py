"""The device, for the library: its callbacks, and what has to be done before the library answers.

Everything here runs in the session's own thread and lets the device do its part in trio, waiting
for it.  `prepare` is given each message before the library takes it, for four reasons:

- The library calls nobody for DEVICE_SET_IRQS with eventfds, nor for DMA logging, and its callback
  for DMA_MAP cannot refuse.  So the device is asked first, and its refusal answers the message.
- Only what was written since the last report counts, and the device knows that, not the library.
  So before a report the library is told what the device has to report.
- DEVICE_RESET leads back to RUNNING from every migration state.  The library refuses it in some and
  keeps the others, so it is led there first.
- Some messages the library does not survive.  Found by reading it, in the middle of 2026: it looks
  at fields of a short DMA_UNMAP and DEVICE_FEATURE before it knows their length; a device state of
  8 is out of its table; a report in smaller pages than those of DMA_LOGGING_START never ends if it
  has more than 255 bits, and one in larger pages is wrong then; MIG_DATA_READ allocates what the
  client says it may, up to 2 GiB.  Our own decoders refuse these.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

from vfio_user_virtio.device import (
    FeatureOperation,
    IrqAction,
    LoggingReport,
    ResetCause,
)
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.eventfd import check_eventfd_untrusted
from vfio_user_virtio.libvfio_user.declarations import MigrationState, Protection, ResetKind
from vfio_user_virtio.libvfio_user.dirty_runs import runs
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol import migration as wire
from vfio_user_virtio.protocol.dma import (
    decode_dma_map_request_untrusted,
    decode_dma_unmap_request_untrusted,
)
from vfio_user_virtio.protocol.dma_logging import (
    LOGGING_REPORT_SIZE,
    decode_logging_report_untrusted,
    decode_logging_start_untrusted,
    encode_logging_report_request,
)
from vfio_user_virtio.protocol.feature import (
    DEVICE_FEATURE_SIZE,
    Feature,
    FeatureRequest,
    decode_feature_request_untrusted,
    encode_feature_request,
)
from vfio_user_virtio.protocol.header import HEADER_SIZE, Command
from vfio_user_virtio.protocol.irq import check_irq_range, decode_set_irqs_request_untrusted
from vfio_user_virtio.protocol.region import REGION_ACCESS_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from vfio_user_virtio.device import Device, IrqRequest
    from vfio_user_virtio.libvfio_user.arrival import Message
    from vfio_user_virtio.libvfio_user.context import Context, DmaRegion

_log: Final = logging.getLogger(__name__)

_Ts = TypeVarTuple("_Ts")
_T = TypeVar("_T")

_STATES: Final = {
    MigrationState.STOP: wire.MigrationState.STOP,
    MigrationState.RUNNING: wire.MigrationState.RUNNING,
    MigrationState.STOP_AND_COPY: wire.MigrationState.STOP_COPY,
    MigrationState.PRE_COPY: wire.MigrationState.PRE_COPY,
    MigrationState.RESUME: wire.MigrationState.RESUMING,
}
_STOPPED: Final = frozenset({MigrationState.STOP, MigrationState.STOP_AND_COPY})
_LOGGING: Final = frozenset(
    {Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT}
)
_MAX_MESSAGE_SIZE: Final = HEADER_SIZE + REGION_ACCESS_SIZE + MAX_DATA_XFER_SIZE
"""SERVER_MAX_MSG_SIZE."""

_GET: Final = FeatureOperation.GET
_SET: Final = FeatureOperation.SET


class DeviceProxy:
    """See the module head; satisfies `description.Answers`.  `over`: the device is not ours.

    `refusals`: how many requests were refused by the device, or by what looks at messages before
    the library does.
    """

    def __init__(self, device: Device, name: str) -> None:
        self.over = False
        self.refusals = 0
        self._device = device
        self._name = name
        self._context: Context | None = None
        self._tell: Callable[[int, bytes], None] | None = None
        self._regions: dict[int, tuple[int, bool]] = {}  # by IOVA: size, and whether it is mapped
        self._promised: tuple[int, int] | None = None  # a mapping that only the device has
        self._gone: int | None = None  # the IOVA of a mapping that only the library has
        self._page_size = 0  # of DMA logging; 0 when it is off
        self._state = MigrationState.RUNNING
        self._silent = False  # in PRE_COPY, which the device does not have: it runs
        self._was_reset = False  # and the library does not know yet
        self._preparations: dict[int, Callable[[Message], None]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._data_read,
            Command.DEVICE_RESET: self._reset,
        }

    def serve(self, context: Context, tell: Callable[[int, bytes], None]) -> None:
        """`tell` has the library take a command, with its payload, that the client has not sent."""
        self._context = context
        self._tell = tell

    # --- what the library calls -----------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        return self._answer(self._device.region_read, index, offset, count)

    def region_write(self, index: int, offset: int, data: memoryview) -> None:
        self._answer(self._device.region_write, index, offset, data)

    def registered(self, region: DmaRegion) -> None:
        self._promised = None
        self._regions[region.iova] = (region.size, region.memory is not None)

    def unregistered(self, region: DmaRegion) -> None:
        self._regions.pop(region.iova, None)
        gone, self._gone = self._gone, None
        if self.over or gone == region.iova:
            return
        try:
            trio.from_thread.run(self._device.dma_unmap, region.iova, region.size)
        except ClientError as error:
            _log.warning("%s: a mapping that libvfio-user has dropped stays: %s", self._name, error)

    def reset(self, kind: ResetKind) -> None:
        if kind is ResetKind.DEVICE and not self._was_reset:
            self._answer(self._device.reset, ResetCause.CLIENT)

    def quiesce(self) -> None:
        """What the client asked for before is done before memory or state goes.

        The device is at rest then: nothing of it runs beside the calls in which it is asked, and it
        does not use the library's mappings, which are what the library is afraid for.
        """
        if not self.over:
            trio.from_thread.run_sync(self._device.work)

    def transition(self, state: MigrationState) -> None:
        silent = False
        if not self._was_reset:
            target = _STATES[state]
            silent = target is wire.MigrationState.PRE_COPY and not self._has_precopy()
            if silent:
                target = wire.MigrationState.RUNNING
            data = wire.encode_device_state(target)
            self._answer(self._device.feature, Feature.MIG_DEVICE_STATE, _SET, data)
        self._state = state
        self._silent = silent

    def _has_precopy(self) -> bool:
        data = self._answer(self._device.feature, Feature.MIGRATION, _GET, b"")
        return wire.MigrationFlags.PRE_COPY in wire.decode_migration_flags_untrusted(data)

    def read_data(self, count: int) -> bytes | memoryview:
        if self._silent:
            return b""
        return self._answer(self._device.migration_read, count)

    def write_data(self, data: memoryview) -> None:
        self._answer(self._device.migration_write, data)

    def _answer(self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> _T:
        """What the device answers.  Raises OSError with the errno of its refusal."""
        try:
            return trio.from_thread.run(function, *args)
        except ClientError as error:
            _log.debug("%s: refused: %s", self._name, error)
            self.refusals += 1
            raise OSError(error.errno, str(error)) from None

    # --- before and after the library answers ---------------------------------------------------

    @property
    def wanted(self) -> Collection[int]:
        """The commands that `prepare` has to see whole."""
        return self._preparations.keys()

    def prepare(self, message: Message) -> None:
        """Do what the device has to before the library takes `message`.

        Raises ClientError: then the library must not have it.
        """
        try:
            self._prepare(message)
        except ClientError:
            self.refusals += 1
            raise

    def _prepare(self, message: Message) -> None:
        if message.size > _MAX_MESSAGE_SIZE:
            raise ClientError(
                errno.EINVAL,
                f"a message of {message.size} bytes; libvfio-user takes {_MAX_MESSAGE_SIZE}, and "
                "of larger ones only the head",
            )
        preparation = self._preparations.get(message.command)
        if preparation is not None:
            preparation(message)

    def settle(self) -> None:
        """The library has answered: take back what it refused after the device had agreed."""
        promised, self._promised = self._promised, None
        if promised is not None:
            trio.from_thread.run(self._device.dma_unmap, *promised)
        self._gone = None
        self._was_reset = False

    def _library_refuses(self) -> bool:
        """In these states it refuses all that follows here but features and migration data."""
        return self._state in _STOPPED

    def _dma_map(self, message: Message) -> None:
        mapping = decode_dma_map_request_untrusted(message.payload, message.fds)
        if not self._library_refuses():
            message.take_fds()
            trio.from_thread.run(self._device.dma_map, mapping)
            self._promised = mapping.iova, mapping.size

    def _dma_unmap(self, message: Message) -> None:
        request = decode_dma_unmap_request_untrusted(message.payload)
        page_size = request.dirty_pgsize
        if not page_size or self._library_refuses():
            return
        report = LoggingReport(request.iova, request.size, page_size)
        if self._has_report(report):
            if self._regions[request.iova][0] != request.size:  # only after it has cleared the bits
                raise ClientError(errno.ENOENT, "libvfio-user drops whole mappings only")
            trio.from_thread.run(self._device.dma_unmap, request.iova, request.size)
            self._gone = request.iova
            self._hand_over(report)  # after the last write to what was mapped

    def _set_irqs(self, message: Message) -> None:
        request = decode_set_irqs_request_untrusted(message.payload, message.fds)
        num_irqs = self._device.device_info().num_irqs
        if request.index >= num_irqs:
            raise ClientError(errno.EINVAL, f"interrupt index {request.index} of {num_irqs}")
        check_irq_range(request, self._device.irq_info(request.index))
        for fd in message.fds:
            check_eventfd_untrusted(fd)
        if not self._library_refuses() and not _is_injection(request):
            message.take_fds()
            trio.from_thread.run(self._device.set_irqs, request)

    def _feature(self, message: Message) -> None:
        request = decode_feature_request_untrusted(message.payload)
        if request.operation & FeatureOperation.PROBE:
            trio.from_thread.run(
                self._device.feature, request.index, request.operation, request.data
            )
        elif request.index == Feature.MIG_DEVICE_STATE and request.operation == _SET:
            wire.decode_device_state_request_untrusted(request.data)
        elif request.index in _LOGGING:
            self._logging(request)

    def _logging(self, request: FeatureRequest) -> None:
        index, operation = request.index, request.operation
        if index == Feature.DMA_LOGGING_REPORT and operation == _GET:
            report = decode_logging_report_untrusted(request.data)
            if self._has_report(report):
                self._hand_over(report)
        elif operation == _SET and index != Feature.DMA_LOGGING_REPORT:
            page_size = 0
            if index == Feature.DMA_LOGGING_START:
                page_size = decode_logging_start_untrusted(request.data).page_size
                if self._page_size not in (0, page_size):
                    raise ClientError(errno.EINVAL, "DMA logging is on with another page size")
            trio.from_thread.run(self._device.feature, index, operation, request.data)
            self._page_size = page_size

    def _has_report(self, report: LoggingReport) -> bool:
        """Whether the library will make this report; one that it cannot make is refused."""
        size, mapped = self._regions.get(report.iova, (0, False))
        if not self._page_size or not mapped or report.length > size:
            return False
        if report.page_size != self._page_size:
            raise ClientError(
                errno.EOPNOTSUPP,
                f"a report in pages of {report.page_size} bytes; libvfio-user can only make it in "
                f"those of DMA_LOGGING_START, {self._page_size} bytes",
            )
        return True

    def _hand_over(self, report: LoggingReport) -> None:
        """Tell the library what the device wrote since the last report."""
        assert self._context is not None
        data = trio.from_thread.run(
            self._device.feature,
            Feature.DMA_LOGGING_REPORT,
            _GET,
            encode_logging_report_request(report),
        )
        end = report.iova + report.length
        for first, last in runs(data[LOGGING_REPORT_SIZE:]):
            start = report.iova + first * report.page_size
            size = min(last * report.page_size + report.iova, end) - start
            self._context.scatter(start, size, Protection.WRITE).mark_dirty()

    def _reset(self, _: Message) -> None:
        if self._state is MigrationState.RUNNING:
            return
        self.quiesce()
        trio.from_thread.run(self._device.reset, ResetCause.CLIENT)
        self._was_reset = True
        assert self._tell is not None
        running = wire.encode_device_state(wire.MigrationState.RUNNING)
        argsz = DEVICE_FEATURE_SIZE + len(running)
        request = FeatureRequest(Feature.MIG_DEVICE_STATE, _SET, running, argsz)
        self._tell(Command.DEVICE_FEATURE, encode_feature_request(request))

    def _data_read(self, message: Message) -> None:
        wire.decode_migration_read_request_untrusted(message.payload)


def _is_injection(request: IrqRequest) -> bool:
    """Whether it triggers interrupts now, which the library does by itself."""
    return request.action is IrqAction.TRIGGER and request.eventfds is None and request.count > 0
