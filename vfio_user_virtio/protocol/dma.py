"""Guest memory: VFIO_USER_DMA_MAP, DMA_UNMAP, DMA_READ and DMA_WRITE.

Source: vfio-user, the sections of those names.  DMA_MAP, with one fd or none; empty reply:

- ``0`` u32 argsz: the size of this request
- ``4`` u32 flags: `DmaAccess`
- ``8`` u64 offset: in the fd
- ``16`` u64 iova
- ``24`` u64 size

DMA_UNMAP; the reply repeats the request:

- ``0`` u32 argsz: the largest reply the client takes
- ``4`` u32 flags: bit 0, also tell the dirty pages (legacy, no longer specified, known to
  libvfio-user); bit 1, everything (iova and size are 0; QEMU sends it, the specification is silent)
- ``8`` u64 iova
- ``16`` u64 size
- ``24`` with bit 0: u64 pgsize, u64 bitmap size in bytes; in the reply the bitmap follows

DMA_READ and DMA_WRITE, from server to client, both ways:

- ``0`` u64 address
- ``8`` u64 count, bytes (the specification prints 4 bytes for the reply to DMA_WRITE; QEMU 11.1.3
  and libvfio-user use 8)
- ``16`` data: `count` bytes in a read reply and in a write request

Everything little-endian.  A range may end at 2**64 exactly.  A vIOMMU's teardown unmaps ranges
nobody mapped, up to the whole address space; that is well-formed, see `Device.dma_unmap`.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE, PAGE_SIZE
from vfio_user_virtio.protocol.checks import (
    distrust,
    refuse,
    require_argsz,
    require_exact_reply,
    require_reply,
    require_request,
)
from vfio_user_virtio.protocol.dirty_bitmap import bitmap_size_untrusted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.header import Buffer

DMA_MAP: Final = struct.Struct("<IIQQQ")
DMA_MAP_SIZE: Final = 32
assert DMA_MAP.size == DMA_MAP_SIZE

DMA_UNMAP: Final = struct.Struct("<IIQQ")
DMA_UNMAP_SIZE: Final = 24
assert DMA_UNMAP.size == DMA_UNMAP_SIZE

UNMAP_BITMAP: Final = struct.Struct("<QQ")
UNMAP_BITMAP_SIZE: Final = 16
assert UNMAP_BITMAP.size == UNMAP_BITMAP_SIZE

DMA_ACCESS: Final = struct.Struct("<QQ")
DMA_ACCESS_SIZE: Final = 16
assert DMA_ACCESS.size == DMA_ACCESS_SIZE

UNMAP_GET_DIRTY_BITMAP: Final = 1 << 0
UNMAP_ALL: Final = 1 << 1


@attrs.frozen
class DmaUnmapRequest:
    """Forget `iova` … `iova` + `size` - 1; `everything` is 0, 2**64.

    With a `dirty_pgsize`, in bytes, the reply is to bring a dirty bitmap of `bitmap_size` bytes.
    """

    iova: int
    size: int
    everything: bool = False
    dirty_pgsize: int = 0
    bitmap_size: int = 0


def encode_dma_map_request(mapping: DmaMapping) -> bytes:
    """The payload; `mapping.fd` is to be sent beside it."""
    return DMA_MAP.pack(DMA_MAP_SIZE, mapping.access, mapping.offset, mapping.iova, mapping.size)


def decode_dma_map_request_untrusted(payload: Buffer, fds: Sequence[int] = ()) -> DmaMapping:
    """The mapping, with the one of `fds`, those of its message, if there is one.

    Raises ClientError(EINVAL), and then the fds are still the message's to close.  What the fd is,
    and whether the mapping overlaps another, is the device's to check.
    """
    require_request(payload, DMA_MAP_SIZE, "DMA_MAP")
    argsz, flags, offset, iova, size = DMA_MAP.unpack_from(payload)
    require_argsz(argsz, DMA_MAP_SIZE, "DMA_MAP")
    access = flags & (DmaAccess.READ | DmaAccess.WRITE)
    if not access or flags != access:
        raise refuse(f"DMA_MAP has flags {flags:#x}; READ (1), WRITE (2) or both are needed")
    _check_range("DMA_MAP", iova, size)
    if len(fds) > 1:
        raise refuse(f"DMA_MAP brings {len(fds)} file descriptors, it takes one or none")
    if fds and offset % PAGE_SIZE:
        raise refuse(f"DMA_MAP has offset {offset:#x}, not a multiple of {PAGE_SIZE}")
    return DmaMapping(iova, size, DmaAccess(access), fds[0] if fds else None, offset)


def encode_dma_unmap_request(request: DmaUnmapRequest) -> bytes:
    if request.everything:
        return DMA_UNMAP.pack(DMA_UNMAP_SIZE, UNMAP_ALL, 0, 0)
    if not request.dirty_pgsize:
        return DMA_UNMAP.pack(DMA_UNMAP_SIZE, 0, request.iova, request.size)
    argsz = DMA_UNMAP_SIZE + UNMAP_BITMAP_SIZE + request.bitmap_size
    head = DMA_UNMAP.pack(argsz, UNMAP_GET_DIRTY_BITMAP, request.iova, request.size)
    return head + UNMAP_BITMAP.pack(request.dirty_pgsize, request.bitmap_size)


def decode_dma_unmap_request_untrusted(payload: Buffer) -> DmaUnmapRequest:
    """Raises ClientError(EINVAL)."""
    require_request(payload, DMA_UNMAP_SIZE, "DMA_UNMAP")
    argsz, flags, iova, size = DMA_UNMAP.unpack_from(payload)
    require_argsz(argsz, DMA_UNMAP_SIZE, "DMA_UNMAP")
    if flags == UNMAP_ALL:
        if iova or size:
            raise refuse(f"DMA_UNMAP of all has iova {iova:#x} and size {size:#x}, both must be 0")
        return DmaUnmapRequest(0, U64_END, everything=True)
    if flags & ~UNMAP_GET_DIRTY_BITMAP:
        raise refuse(f"DMA_UNMAP has flags {flags:#x}; 0, 1 or 2 is expected")
    _check_range("DMA_UNMAP", iova, size)
    if not flags:
        return DmaUnmapRequest(iova, size)
    require_request(payload, DMA_UNMAP_SIZE + UNMAP_BITMAP_SIZE, "DMA_UNMAP with a dirty bitmap")
    pgsize, bitmap_size = UNMAP_BITMAP.unpack_from(payload, DMA_UNMAP_SIZE)
    needed = bitmap_size_untrusted(size, pgsize, "DMA_UNMAP")
    if not needed <= bitmap_size <= MAX_DATA_XFER_SIZE:
        raise refuse(
            f"DMA_UNMAP has a dirty bitmap of {bitmap_size} bytes; "
            f"{needed} are needed, {MAX_DATA_XFER_SIZE} is the limit"
        )
    require_argsz(argsz, DMA_UNMAP_SIZE + UNMAP_BITMAP_SIZE + bitmap_size, "DMA_UNMAP")
    return DmaUnmapRequest(iova, size, False, pgsize, bitmap_size)


def encode_dma_unmap_reply(request: DmaUnmapRequest, bitmap: bytes = b"") -> bytes:
    """`bitmap`, if one was asked for, is padded with zeroes to the size the client gave."""
    head = encode_dma_unmap_request(request)
    return head + bitmap.ljust(request.bitmap_size, b"\0")


def decode_dma_unmap_reply_untrusted(payload: Buffer, request: DmaUnmapRequest) -> bytes:
    """The dirty bitmap, empty if none was asked for.  Raises ConnectionLost."""
    head = DMA_UNMAP_SIZE
    if request.dirty_pgsize:
        head += UNMAP_BITMAP_SIZE
    require_exact_reply(payload, head + request.bitmap_size, "DMA_UNMAP")
    return bytes(payload[head:])


def encode_dma_read_request(address: int, count: int) -> bytes:
    return DMA_ACCESS.pack(address, count)


def decode_dma_read_request_untrusted(
    payload: Buffer, max_count: int = MAX_DATA_XFER_SIZE
) -> tuple[int, int]:
    """(address, count).  Raises ClientError: EINVAL, or E2BIG beyond `max_count`, as QEMU does."""
    if len(payload) != DMA_ACCESS_SIZE:
        raise refuse(f"DMA_READ has a payload of {len(payload)} bytes, not {DMA_ACCESS_SIZE}")
    return _decode_access("DMA_READ", payload, max_count)


def encode_dma_read_reply(address: int, data: Buffer) -> bytes:
    return b"".join((DMA_ACCESS.pack(address, len(data)), data))


def decode_dma_read_reply_untrusted(payload: bytes, count: int) -> bytes:
    """The data.  Raises ConnectionLost unless it is the `count` bytes that were asked for."""
    require_exact_reply(payload, DMA_ACCESS_SIZE + count, "DMA_READ")
    _require_count(payload, count, "DMA_READ")
    return payload[DMA_ACCESS_SIZE:]


def encode_dma_write_request(address: int, data: Buffer) -> bytes:
    return b"".join((DMA_ACCESS.pack(address, len(data)), data))


def decode_dma_write_request_untrusted(
    payload: Buffer, max_count: int = MAX_DATA_XFER_SIZE
) -> tuple[int, int]:
    """(address, count); the data is ``payload[DMA_ACCESS_SIZE:]``.

    Raises ClientError: EINVAL, or E2BIG for a count beyond `max_count` or the data, as QEMU does.
    """
    require_request(payload, DMA_ACCESS_SIZE, "DMA_WRITE")
    address, count = _decode_access("DMA_WRITE", payload, max_count)
    brought = len(payload) - DMA_ACCESS_SIZE
    if count != brought:
        code = errno.E2BIG if count > brought else errno.EINVAL
        raise refuse(f"DMA_WRITE of {count} bytes brings {brought}", code)
    return address, count


def encode_dma_write_reply(address: int, count: int) -> bytes:
    return DMA_ACCESS.pack(address, count)


def decode_dma_write_reply_untrusted(payload: Buffer, count: int) -> None:
    """Raises ConnectionLost unless all `count` bytes are said to be written."""
    require_reply(payload, DMA_ACCESS_SIZE, "DMA_WRITE")
    _require_count(payload, count, "DMA_WRITE")


def _decode_access(name: str, payload: Buffer, max_count: int) -> tuple[int, int]:
    address, count = DMA_ACCESS.unpack_from(payload)
    if count > max_count:
        raise refuse(f"{name} of {count} bytes; max_data_xfer_size is {max_count}", errno.E2BIG)
    if address + count > U64_END:
        raise refuse(f"{name} of {count} bytes at {address:#x} passes the end of 64 bits")
    return address, count


def _require_count(payload: Buffer, count: int, name: str) -> None:
    counted = DMA_ACCESS.unpack_from(payload)[1]
    if counted != count:
        raise distrust(f"the reply to {name} counts {counted} bytes, {count} were meant")


def _check_range(name: str, iova: int, size: int) -> None:
    if not size or iova + size > U64_END:
        raise refuse(f"{name} of {size:#x} bytes at {iova:#x} is empty or passes 2**64")
