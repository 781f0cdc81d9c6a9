"""VFIO_USER_DEVICE_GET_REGION_IO_FDS: eventfds and ioregionfds that stand for parts of a region.

Source: vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS.  Payload, both ways, little-endian:

- ``0`` u32 argsz: the largest reply the client takes; in the reply, the size that is needed
- ``4`` u32 flags: 0
- ``8`` u32 index: of the region
- ``12`` u32 count: 0 in a request; in the reply, the number of entries that follow

An entry has 40 bytes:

- ``+0`` u64 offset and ``+8`` u64 size, in the region
- ``+16`` u32 fd_index: among the fds that come with the reply
- ``+20`` u32 type: `IoFdType`
- ``+24`` u32 flags, ``+28`` u32 padding
- ``+32`` u64 datamatch (ioeventfd) or user_data (ioregionfd)

No QEMU sends it.  libvfio-user's entry has 48 bytes (a shadow offset); the specification's, which
this is, has 40, although its text computes with a head of 32 bytes where it prints 16.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.protocol.checks import (
    distrust,
    refuse,
    require_argsz,
    require_reply,
    require_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.header import Buffer

REGION_IO_FDS: Final = struct.Struct("<IIII")
REGION_IO_FDS_SIZE: Final = 16
assert REGION_IO_FDS.size == REGION_IO_FDS_SIZE

IO_FD: Final = struct.Struct("<QQIII4xQ")
IO_FD_SIZE: Final = 40
assert IO_FD.size == IO_FD_SIZE

_NAME: Final = "DEVICE_GET_REGION_IO_FDS"


class IoFdType(enum.IntEnum):
    """What kind of fd an entry is about."""

    IOEVENTFD = 0
    IOREGIONFD = 1


@attrs.frozen
class IoFd:
    """One entry; `match` is datamatch or user_data, `type` may be a number no `IoFdType` has."""

    offset: int
    size: int
    fd_index: int
    type: int
    flags: int = 0
    match: int = 0


@attrs.frozen
class RegionIoFdsRequest:
    """Which region, and the largest reply payload that is taken, in bytes."""

    index: int
    argsz: int = REGION_IO_FDS_SIZE


@attrs.frozen
class RegionIoFdsReply:
    """If `argsz` is larger than the reply, the server wants to be asked again with it."""

    argsz: int
    index: int
    entries: tuple[IoFd, ...]


def encode_region_io_fds_request(index: int, argsz: int = REGION_IO_FDS_SIZE) -> bytes:
    return REGION_IO_FDS.pack(argsz, 0, index, 0)


def decode_region_io_fds_request_untrusted(payload: Buffer) -> RegionIoFdsRequest:
    """Raises ClientError(EINVAL)."""
    require_request(payload, REGION_IO_FDS_SIZE, _NAME)
    argsz, flags, index, count = REGION_IO_FDS.unpack_from(payload)
    require_argsz(argsz, REGION_IO_FDS_SIZE, _NAME)
    if flags or count:
        raise refuse(f"{_NAME} has flags {flags:#x} and count {count}, both must be 0")
    return RegionIoFdsRequest(index, argsz)


def encode_region_io_fds_reply(request: RegionIoFdsRequest, entries: Sequence[IoFd]) -> bytes:
    """Without entries if they exceed the request's argsz; fds then stay at home too."""
    needed = REGION_IO_FDS_SIZE + IO_FD_SIZE * len(entries)
    sent = entries if needed <= request.argsz else ()
    parts = [REGION_IO_FDS.pack(needed, 0, request.index, len(sent))]
    parts += [
        IO_FD.pack(entry.offset, entry.size, entry.fd_index, entry.type, entry.flags, entry.match)
        for entry in sent
    ]
    return b"".join(parts)


def decode_region_io_fds_reply_untrusted(payload: Buffer, num_fds: int) -> RegionIoFdsReply:
    """Raises ConnectionLost; every fd_index is below `num_fds`, the fds that came along."""
    require_reply(payload, REGION_IO_FDS_SIZE, _NAME)
    argsz, _, index, count = REGION_IO_FDS.unpack_from(payload)
    end = REGION_IO_FDS_SIZE + IO_FD_SIZE * count
    if end > len(payload):
        raise distrust(f"the reply to {_NAME} counts {count} entries in {len(payload)} bytes")
    view = memoryview(payload)[REGION_IO_FDS_SIZE:end]
    entries = tuple(IoFd(*entry) for entry in IO_FD.iter_unpack(view))
    for entry in entries:
        if entry.fd_index >= num_fds:
            raise distrust(f"the reply to {_NAME} names fd {entry.fd_index} of {num_fds}")
    return RegionIoFdsReply(argsz, index, entries)
