"""Register access: VFIO_USER_REGION_READ, REGION_WRITE and REGION_WRITE_MULTI.

Source: vfio-user, the sections of those names.  REGION_READ and REGION_WRITE, both ways,
little-endian:

- ``0`` u64 offset: in the region, bytes
- ``8`` u32 region: its index
- ``12`` u32 count: bytes
- ``16`` data: `count` bytes in a write request and in a read reply

REGION_WRITE_MULTI, request; the reply is a u64, the number of writes done:

- ``0`` u64 wr_cnt, then that many entries of 24 bytes:
- ``+0`` u64 offset, ``+8`` u32 region, ``+12`` u32 count (at most 8), ``+16`` 8 bytes of data

Reads and writes are the hot path: a guest's register access waits for one of these with its vCPU
stopped and QEMU's big lock held.  So, unlike the other modules, this one makes no object of a
request but a tuple, and its replies are whole messages, header included, packed at once.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE, MAX_WRITE_MULTI
from vfio_user_virtio.protocol.checks import (
    distrust,
    refuse,
    require_exact_reply,
    require_request,
)
from vfio_user_virtio.protocol.header import HEADER_SIZE, REPLY, Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.header import Buffer

REGION_ACCESS: Final = struct.Struct("<QII")
REGION_ACCESS_SIZE: Final = 16
assert REGION_ACCESS.size == REGION_ACCESS_SIZE

REGION_REPLY: Final = struct.Struct("<HHIIIQII")
"""A header and a region access in one."""
assert REGION_REPLY.size == HEADER_SIZE + REGION_ACCESS_SIZE

WRITE_COUNT: Final = struct.Struct("<Q")
assert WRITE_COUNT.size == 8

WRITE_ENTRY: Final = struct.Struct("<QII8s")
WRITE_ENTRY_SIZE: Final = 24
assert WRITE_ENTRY.size == WRITE_ENTRY_SIZE

MAX_ENTRY_DATA: Final = 8
"""Bytes one entry of REGION_WRITE_MULTI can write."""

_READ: Final = int(Command.REGION_READ)
_WRITE: Final = int(Command.REGION_WRITE)
_MULTI: Final = "REGION_WRITE_MULTI"


def check_region_range(offset: int, count: int, size: int) -> None:
    """Raises ClientError(EINVAL) unless the bytes lie in a region of `size` bytes."""
    if offset + count > size:
        raise refuse(f"{count} bytes at {offset:#x} are not inside a region of {size:#x} bytes")


def encode_region_read_request(offset: int, region: int, count: int) -> bytes:
    return REGION_ACCESS.pack(offset, region, count)


def decode_region_read_request_untrusted(
    payload: bytes, max_count: int = MAX_DATA_XFER_SIZE
) -> tuple[int, int, int]:
    """(offset, region, count); a count of 0 is answered like any other.

    Raises ClientError(EINVAL).  The range is the session's to check: `check_region_range`.
    """
    if len(payload) != REGION_ACCESS_SIZE:
        raise refuse(f"REGION_READ has a payload of {len(payload)} bytes, not {REGION_ACCESS_SIZE}")
    access: tuple[int, int, int] = REGION_ACCESS.unpack(payload)
    if access[2] > max_count:
        raise refuse(f"REGION_READ of {access[2]} bytes; max_data_xfer_size is {max_count}")
    return access


def encode_region_read_reply(message_id: int, offset: int, region: int, data: bytes) -> bytes:
    """A whole message (see the module head)."""
    count = len(data)
    size = HEADER_SIZE + REGION_ACCESS_SIZE + count
    return REGION_REPLY.pack(message_id, _READ, size, REPLY, 0, offset, region, count) + data


def decode_region_read_reply_untrusted(payload: bytes, count: int) -> bytes:
    """The data.  Raises ConnectionLost unless it is the `count` bytes that were asked for."""
    require_exact_reply(payload, REGION_ACCESS_SIZE + count, "REGION_READ")
    announced = REGION_ACCESS.unpack_from(payload)[2]
    if announced != count:
        raise distrust(f"the reply to REGION_READ counts {announced} bytes, asked were {count}")
    return payload[REGION_ACCESS_SIZE:]


def encode_region_write_request(offset: int, region: int, data: Buffer) -> bytes:
    return b"".join((REGION_ACCESS.pack(offset, region, len(data)), data))


def decode_region_write_request_untrusted(
    payload: bytes, max_count: int = MAX_DATA_XFER_SIZE
) -> tuple[int, int, int]:
    """(offset, region, count); the data is ``payload[REGION_ACCESS_SIZE:]``.

    Raises ClientError(EINVAL).  The range is the session's to check: `check_region_range`.
    """
    size = len(payload)
    if size < REGION_ACCESS_SIZE:
        raise refuse(f"REGION_WRITE has a payload of {size} bytes, {REGION_ACCESS_SIZE} are needed")
    access: tuple[int, int, int] = REGION_ACCESS.unpack_from(payload)
    count = access[2]
    if size != REGION_ACCESS_SIZE + count:
        raise refuse(f"REGION_WRITE of {count} bytes brings {size - REGION_ACCESS_SIZE}")
    if count > max_count:
        raise refuse(f"REGION_WRITE of {count} bytes; max_data_xfer_size is {max_count}")
    return access


def encode_region_write_reply(message_id: int, offset: int, region: int, count: int) -> bytes:
    """A whole message (see the module head)."""
    size = HEADER_SIZE + REGION_ACCESS_SIZE
    return REGION_REPLY.pack(message_id, _WRITE, size, REPLY, 0, offset, region, count)


def decode_region_write_reply_untrusted(payload: bytes, count: int) -> None:
    """Raises ConnectionLost unless all `count` bytes are said to be written."""
    require_exact_reply(payload, REGION_ACCESS_SIZE, "REGION_WRITE")
    written = REGION_ACCESS.unpack(payload)[2]
    if written != count:
        raise distrust(f"the reply to REGION_WRITE counts {written} bytes, sent were {count}")


def encode_region_write_multi_request(writes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Entries are (offset, region, at most 8 bytes)."""
    parts = [WRITE_COUNT.pack(len(writes))]
    parts += [WRITE_ENTRY.pack(offset, region, len(data), data) for offset, region, data in writes]
    return b"".join(parts)


def decode_region_write_multi_request_untrusted(payload: bytes) -> list[tuple[int, int, bytes]]:
    """The writes, in order, as (offset, region, data).

    Raises ClientError (EINVAL; E2BIG beyond `limits.MAX_WRITE_MULTI`) before any can be done.
    """
    require_request(payload, WRITE_COUNT.size, _MULTI)
    (wr_cnt,) = WRITE_COUNT.unpack_from(payload)
    if len(payload) != WRITE_COUNT.size + wr_cnt * WRITE_ENTRY_SIZE:
        raise refuse(f"{_MULTI} of {wr_cnt} writes has a payload of {len(payload)} bytes")
    if wr_cnt > MAX_WRITE_MULTI:
        raise refuse(f"{_MULTI} of {wr_cnt} writes, at most {MAX_WRITE_MULTI}", errno.E2BIG)
    writes = []
    for offset, region, count, data in WRITE_ENTRY.iter_unpack(payload[WRITE_COUNT.size :]):
        if count > MAX_ENTRY_DATA:
            raise refuse(f"{_MULTI} has a write of {count} bytes, at most {MAX_ENTRY_DATA}")
        writes.append((offset, region, data[:count]))
    return writes


def encode_region_write_multi_reply(wr_cnt: int) -> bytes:
    return WRITE_COUNT.pack(wr_cnt)


def decode_region_write_multi_reply_untrusted(payload: bytes) -> int:
    """How many writes were done.  Raises ConnectionLost."""
    require_exact_reply(payload, WRITE_COUNT.size, _MULTI)
    wr_cnt: int = WRITE_COUNT.unpack(payload)[0]
    return wr_cnt
