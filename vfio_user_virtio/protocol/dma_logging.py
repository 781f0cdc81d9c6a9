"""The DMA logging features: which guest pages the device wrote.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE.  Features' data, little-endian:

DMA_LOGGING_START, SET (DMA_LOGGING_STOP, SET, has none):

- ``0`` u64 page_size: a hint, in bytes
- ``8`` u32 num_ranges: 0 logs everything
- ``12`` u32 reserved
- ``16`` num_ranges times u64 iova, u64 length

DMA_LOGGING_REPORT, GET, both ways:

- ``0`` u64 iova
- ``8`` u64 length
- ``16`` u64 page_size: bytes each bit stands for
- ``24`` in the reply: the bitmap (`dirty_bitmap`)

The kernel's structure has a pointer where the wire has the ranges; a client that forwards it as it
is announces ranges that are not there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import U64_END, LoggingReport, LoggingStart
from vfio_user_virtio.protocol.checks import distrust, refuse, require_reply, require_request
from vfio_user_virtio.protocol.dirty_bitmap import bitmap_size_untrusted

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

LOGGING_START: Final = struct.Struct("<QI4x")
LOGGING_START_SIZE: Final = 16
assert LOGGING_START.size == LOGGING_START_SIZE

LOGGING_RANGE: Final = struct.Struct("<QQ")
LOGGING_RANGE_SIZE: Final = 16
assert LOGGING_RANGE.size == LOGGING_RANGE_SIZE

LOGGING_REPORT: Final = struct.Struct("<QQQ")
LOGGING_REPORT_SIZE: Final = 24
assert LOGGING_REPORT.size == LOGGING_REPORT_SIZE

_START: Final = "DMA_LOGGING_START"
_REPORT: Final = "DMA_LOGGING_REPORT"


def encode_logging_start(start: LoggingStart) -> bytes:
    parts = [LOGGING_START.pack(start.page_size, len(start.ranges))]
    parts += [LOGGING_RANGE.pack(*one) for one in start.ranges]
    return b"".join(parts)


def decode_logging_start_untrusted(data: Buffer) -> LoggingStart:
    """Raises ClientError(EINVAL)."""
    require_request(data, LOGGING_START_SIZE, _START)
    page_size, num_ranges = LOGGING_START.unpack_from(data)
    if not page_size or page_size & (page_size - 1):
        raise refuse(f"{_START} has page size {page_size}, which is no power of two")
    if len(data) != LOGGING_START_SIZE + LOGGING_RANGE_SIZE * num_ranges:
        raise refuse(f"{_START} of {num_ranges} ranges has {len(data)} bytes of data")
    view = memoryview(data)[LOGGING_START_SIZE:]
    ranges = tuple((iova, length) for iova, length in LOGGING_RANGE.iter_unpack(view))
    for iova, length in ranges:
        _check_range(_START, iova, length)
    return LoggingStart(page_size, ranges)


def encode_logging_report_request(report: LoggingReport) -> bytes:
    return LOGGING_REPORT.pack(report.iova, report.length, report.page_size)


def decode_logging_report_untrusted(data: Buffer) -> LoggingReport:
    """Raises ClientError(EINVAL), also for a range whose bitmap fits no message."""
    require_request(data, LOGGING_REPORT_SIZE, _REPORT)
    iova, length, page_size = LOGGING_REPORT.unpack_from(data)
    _check_range(_REPORT, iova, length)
    bitmap_size_untrusted(length, page_size, _REPORT)
    return LoggingReport(iova, length, page_size)


def logging_report_reply_size(report: LoggingReport) -> int:
    """Bytes of data of the reply.  Raises ClientError(EINVAL) as the decoder does."""
    return LOGGING_REPORT_SIZE + bitmap_size_untrusted(report.length, report.page_size, _REPORT)


def encode_logging_report_reply(report: LoggingReport, bitmap: Buffer) -> bytes:
    return b"".join((encode_logging_report_request(report), bitmap))


def decode_logging_report_reply_untrusted(data: Buffer, report: LoggingReport) -> bytes:
    """The bitmap, of the size that `report` makes it.  Raises ConnectionLost."""
    size = bitmap_size_untrusted(report.length, report.page_size, _REPORT)
    require_reply(data, LOGGING_REPORT_SIZE, _REPORT)
    if len(data) != LOGGING_REPORT_SIZE + size:
        raise distrust(f"the reply to {_REPORT} has {len(data)} bytes of data, not {size} and 24")
    return bytes(data[LOGGING_REPORT_SIZE:])


def _check_range(name: str, iova: int, length: int) -> None:
    if not length or iova + length > U64_END:
        raise refuse(f"{name} of {length:#x} bytes at {iova:#x} is empty or passes 2**64")
