"""The commands of a client, once it has negotiated: check, call the device, make the reply.

Every handler takes a frame and returns the whole reply message with the fds to send beside it; it
raises ClientError before the device has been touched, or because the device refused.  Sending,
silence (NO_REPLY) and counting are the session's business.

What stands here between the client and the device, so that no device has to: sizes and shapes (the
decoders), indices and ranges, and whether an fd is an eventfd.  A device checks what only it can
know: whether a mapping overlaps another, what a file is, what state it is in.

Source: vfio-user, Commands.  Sizes and flags of regions are asked once: they are fixed while a
session lives.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from vfio_user_virtio.device import FeatureOperation, LoggingReport, RegionFlags, ResetCause
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.eventfd import check_eventfd_untrusted
from vfio_user_virtio.protocol.device_info import (
    decode_device_info_request_untrusted,
    encode_device_info_reply,
)
from vfio_user_virtio.protocol.dma import (
    decode_dma_map_request_untrusted,
    decode_dma_unmap_request_untrusted,
    encode_dma_unmap_reply,
)
from vfio_user_virtio.protocol.dma_logging import (
    LOGGING_REPORT_SIZE,
    decode_logging_report_untrusted,
    encode_logging_report_request,
    logging_report_reply_size,
)
from vfio_user_virtio.protocol.feature import (
    DEVICE_FEATURE_SIZE,
    Feature,
    decode_feature_request_untrusted,
    encode_feature_reply,
)
from vfio_user_virtio.protocol.framing import Frame
from vfio_user_virtio.protocol.header import COMMANDS_WITH_FDS, Buffer, Command, encode_reply
from vfio_user_virtio.protocol.irq import (
    check_irq_range,
    decode_irq_info_request_untrusted,
    decode_set_irqs_request_untrusted,
    encode_irq_info_reply,
)
from vfio_user_virtio.protocol.migration import (
    MIG_DATA_SIZE,
    decode_migration_read_request_untrusted,
    decode_migration_write_request_untrusted,
    encode_migration_data_head,
)
from vfio_user_virtio.protocol.precopy_info import (
    decode_precopy_info_request_untrusted,
    encode_precopy_info_reply,
)
from vfio_user_virtio.protocol.region import (
    REGION_ACCESS_SIZE,
    check_region_range,
    decode_region_read_request_untrusted,
    decode_region_write_multi_request_untrusted,
    decode_region_write_request_untrusted,
    encode_region_read_reply,
    encode_region_write_multi_reply,
    encode_region_write_reply,
)
from vfio_user_virtio.protocol.region_info import (
    decode_region_info_request_untrusted,
    encode_region_info_reply,
)
from vfio_user_virtio.protocol.region_io_fds import (
    decode_region_io_fds_request_untrusted,
    encode_region_io_fds_reply,
)

if TYPE_CHECKING:
    from vfio_user_virtio.device import Device, IrqInfo
    from vfio_user_virtio.protocol.version import Capabilities

Answer: TypeAlias = tuple[bytes, Sequence[int], Buffer]
"""A reply, the fds that go with it, which stay the device's, and the end of the reply, if that is
better not copied (`Endpoint.post`)."""

Handler: TypeAlias = Callable[[Frame], Awaitable[Answer]]

_GET: Final = FeatureOperation.GET


class Commands:
    """See the module head."""

    def __init__(self, device: Device, granted: Capabilities) -> None:
        self._device = device
        self._max_count = granted.max_data_xfer_size
        self._max_fds = max(1, granted.max_msg_fds)
        info = device.device_info()
        self._num_regions = info.num_regions
        self._num_irqs = info.num_irqs
        regions = {index: device.region_info(index) for index in range(info.num_regions)}
        self._readable = {i: r.size for i, r in regions.items() if r.flags & RegionFlags.READ}
        self._writable = {i: r.size for i, r in regions.items() if r.flags & RegionFlags.WRITE}
        self._handlers: dict[int, Handler] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DMA_READ: self._server_only,
            Command.DMA_WRITE: self._server_only,
            Command.DEVICE_RESET: self._reset,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._migration_read,
            Command.MIG_DATA_WRITE: self._migration_write,
            Command.MIG_GET_PRECOPY_INFO: self._precopy_info,
        }

    async def answer(self, frame: Frame) -> Answer:
        """Do what `frame` commands.  Raises ClientError."""
        handler = self._handlers.get(frame.command)
        if handler is None:
            raise ClientError(errno.ENOSYS, f"command {frame.command} is unknown")
        if frame.fds:
            self._check_fds(frame)
        return await handler(frame)

    def _check_fds(self, frame: Frame) -> None:
        if frame.command not in COMMANDS_WITH_FDS:
            raise _invalid(f"it brought {len(frame.fds)} file descriptors, it takes none")
        if len(frame.fds) > self._max_fds:
            raise _invalid(f"{len(frame.fds)} file descriptors; max_msg_fds is {self._max_fds}")

    # --- register access, which is what there is most of ----------------------------------------

    async def _region_read(self, frame: Frame) -> Answer:
        offset, region, count = decode_region_read_request_untrusted(frame.payload, self._max_count)
        size = self._readable.get(region)
        if size is None:
            raise _invalid(f"region {region} is absent or cannot be read")
        check_region_range(offset, count, size)
        data = await self._device.region_read(region, offset, count) if count else b""
        return encode_region_read_reply(frame.message_id, offset, region, data), (), b""

    async def _region_write(self, frame: Frame) -> Answer:
        payload = frame.payload
        offset, region, count = decode_region_write_request_untrusted(payload, self._max_count)
        self._check_write(region, offset, count)
        if count:
            await self._device.region_write(region, offset, payload[REGION_ACCESS_SIZE:])
        return encode_region_write_reply(frame.message_id, offset, region, count), (), b""

    async def _region_write_multi(self, frame: Frame) -> Answer:
        writes = decode_region_write_multi_request_untrusted(frame.payload)
        for offset, region, data in writes:
            self._check_write(region, offset, len(data))
        for offset, region, data in writes:
            if data:
                await self._device.region_write(region, offset, data)
        return encode_reply(frame, encode_region_write_multi_reply(len(writes))), (), b""

    def _check_write(self, region: int, offset: int, count: int) -> None:
        size = self._writable.get(region)
        if size is None:
            raise _invalid(f"region {region} is absent or cannot be written")
        check_region_range(offset, count, size)

    # --- what the device is -------------------------------------------------------------------

    async def _device_info(self, frame: Frame) -> Answer:
        decode_device_info_request_untrusted(frame.payload)
        return encode_reply(frame, encode_device_info_reply(self._device.device_info())), (), b""

    async def _region_info(self, frame: Frame) -> Answer:
        request = decode_region_info_request_untrusted(frame.payload)
        self._check_region(request.index)
        info = self._device.region_info(request.index)
        payload, fds = encode_region_info_reply(request, info)
        return encode_reply(frame, payload), fds, b""

    async def _region_io_fds(self, frame: Frame) -> Answer:
        request = decode_region_io_fds_request_untrusted(frame.payload)
        self._check_region(request.index)
        return encode_reply(frame, encode_region_io_fds_reply(request, ())), (), b""

    async def _irq_info(self, frame: Frame) -> Answer:
        index = decode_irq_info_request_untrusted(frame.payload)
        return encode_reply(frame, encode_irq_info_reply(index, self._irq(index))), (), b""

    def _check_region(self, index: int) -> None:
        if index >= self._num_regions:
            raise _invalid(f"region {index} of {self._num_regions}")

    def _irq(self, index: int) -> IrqInfo:
        if index >= self._num_irqs:
            raise _invalid(f"interrupt index {index} of {self._num_irqs}")
        return self._device.irq_info(index)

    # --- what the device is given ---------------------------------------------------------------

    async def _set_irqs(self, frame: Frame) -> Answer:
        request = decode_set_irqs_request_untrusted(frame.payload, frame.fds)
        check_irq_range(request, self._irq(request.index))
        for fd in frame.fds:
            check_eventfd_untrusted(fd)
        frame.take_fds()
        await self._device.set_irqs(request)
        return encode_reply(frame), (), b""

    async def _dma_map(self, frame: Frame) -> Answer:
        mapping = decode_dma_map_request_untrusted(frame.payload, frame.fds)
        frame.take_fds()
        await self._device.dma_map(mapping)
        return encode_reply(frame), (), b""

    async def _dma_unmap(self, frame: Frame) -> Answer:
        request = decode_dma_unmap_request_untrusted(frame.payload)
        page_size = request.dirty_pgsize
        if page_size:  # a report of one byte clears no page: it tells whether there are reports
            await self._dirty_bitmap(LoggingReport(request.iova, 1, page_size))
        await self._device.dma_unmap(request.iova, request.size)
        bitmap = b""
        if page_size:  # after the last write to what was mapped
            bitmap = await self._dirty_bitmap(LoggingReport(request.iova, request.size, page_size))
        return encode_reply(frame, encode_dma_unmap_reply(request, bitmap)), (), b""

    async def _dirty_bitmap(self, report: LoggingReport) -> bytes:
        asked = encode_logging_report_request(report)
        try:
            reply = await self._device.feature(Feature.DMA_LOGGING_REPORT, _GET, asked)
        except ClientError as error:
            raise ClientError(
                errno.EOPNOTSUPP,
                f"DMA_UNMAP with a dirty bitmap needs DMA logging to be on: {error}",
            ) from error
        return reply[LOGGING_REPORT_SIZE:]

    async def _reset(self, frame: Frame) -> Answer:
        await self._device.reset(ResetCause.CLIENT)
        return encode_reply(frame), (), b""

    # --- migration ------------------------------------------------------------------------------

    async def _feature(self, frame: Frame) -> Answer:
        request = decode_feature_request_untrusted(frame.payload)
        if request.index == Feature.DMA_LOGGING_REPORT and request.operation == _GET:
            size = logging_report_reply_size(decode_logging_report_untrusted(request.data))
            if request.argsz < DEVICE_FEATURE_SIZE + size:  # what is reported once must be sent
                empty = encode_feature_reply(request, bytes(size))
                return encode_reply(frame, empty), (), b""
        data = await self._device.feature(request.index, request.operation, request.data)
        return encode_reply(frame, encode_feature_reply(request, data)), (), b""

    async def _migration_read(self, frame: Frame) -> Answer:
        size = decode_migration_read_request_untrusted(frame.payload, self._max_count)
        data = await self._device.migration_read(size)
        head = encode_migration_data_head(len(data))
        return encode_reply(frame, head, tail_size=len(data)), (), data

    async def _migration_write(self, frame: Frame) -> Answer:
        decode_migration_write_request_untrusted(frame.payload, self._max_count)
        await self._device.migration_write(memoryview(frame.payload)[MIG_DATA_SIZE:])
        return encode_reply(frame), (), b""

    async def _precopy_info(self, frame: Frame) -> Answer:
        decode_precopy_info_request_untrusted(frame.payload)
        initial_bytes, dirty_bytes = await self._device.precopy_info()
        return encode_reply(frame, encode_precopy_info_reply(initial_bytes, dirty_bytes)), (), b""

    # --- what may not be asked ------------------------------------------------------------------

    async def _version(self, frame: Frame) -> Answer:
        del frame
        raise _invalid("the version is negotiated already")

    async def _server_only(self, frame: Frame) -> Answer:
        raise _invalid(f"{Command(frame.command).name} goes from the server to the client")


def _invalid(message: str) -> ClientError:
    return ClientError(errno.EINVAL, message)
