"""What the kernel and a user of iommufd say to each other: linux/iommufd.h, and VFIO's part in it.

As in `uapi`: native byte order, u32 if nothing else is said, offsets in bytes.  `size` is that of
the structure, so that the kernel can tell older from newer ones.

On the device (linux/vfio.h):

- bind, 24: ``0`` argsz, ``4`` flags (1: a token), ``8`` s32 iommufd, ``12`` devid (answer), ``16``
  u64 pointer to the 16 bytes of the token; without one the first 16 bytes are sent alone
- attach, 12: ``0`` argsz, ``4`` flags, ``8`` pt_id: an IOAS or a HWPT; answered with the HWPT

On /dev/iommu:

- destroy, 8: ``0`` size, ``4`` id
- IOAS alloc, 12: ``0`` size, ``4`` flags, ``8`` id (answer)
- IOVA ranges, 32: ``0`` size, ``4`` IOAS, ``8`` number of ranges that fit (answer: that there are),
  ``12`` reserved, ``16`` u64 pointer to pairs of u64 first and last, ``24`` u64 alignment (answer)
- map, 40: ``0`` size, ``4`` flags (1 at this address, 2 writable, 4 readable), ``8`` IOAS, ``12``
  reserved, ``16`` u64 our address, ``24`` u64 length, ``32`` u64 iova
- map file, 40: the same with ``12`` s32 descriptor and ``16`` u64 offset in the file
- unmap, 24: ``0`` size, ``4`` IOAS, ``8`` u64 iova, ``16`` u64 length, answered with what was
  unmapped
- HWPT alloc, 40: ``0`` size, ``4`` flags (2: dirty tracking), ``8`` device, ``12`` IOAS, ``16``
  HWPT (answer), ``20`` reserved, ``24`` data type 0, ``28`` data length 0, ``32`` u64 0
- hardware info, 40: ``0`` size, ``4`` flags, ``8`` device, ``12`` data length 0, ``16`` u64 0,
  ``24`` type (answer), ``28`` reserved, ``32`` u64 capabilities (answer; 1: dirty tracking)
- set dirty tracking, 16: ``0`` size, ``4`` flags (1 on), ``8`` HWPT, ``12`` reserved
- get dirty bitmap, 48: ``0`` size, ``4`` HWPT, ``8`` flags (1: do not clear), ``12`` reserved,
  ``16`` u64 iova, ``24`` u64 length, ``32`` u64 page size, ``40`` u64 pointer to the bitmap

Source: Linux, include/uapi/linux/iommufd.h and vfio.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from vfio_user_virtio.device import DmaAccess

BIND: Final = struct.Struct("=IIiIQ")
BIND_WITHOUT_TOKEN_SIZE: Final = 16
ATTACH: Final = struct.Struct("=III")
DESTROY: Final = struct.Struct("=II")
IOAS_ALLOC: Final = struct.Struct("=III")
IOVA_RANGES: Final = struct.Struct("=IIIIQQ")
IOVA_RANGE: Final = struct.Struct("=QQ")
MAP: Final = struct.Struct("=IIIIQQQ")
MAP_FILE: Final = struct.Struct("=IIIiQQQ")
UNMAP: Final = struct.Struct("=IIQQ")
HWPT_ALLOC: Final = struct.Struct("=IIIIIIIIQ")
HW_INFO: Final = struct.Struct("=IIIIQIIQ")
SET_DIRTY_TRACKING: Final = struct.Struct("=IIII")
GET_DIRTY_BITMAP: Final = struct.Struct("=IIIIQQQQ")
assert (BIND.size, ATTACH.size, DESTROY.size, IOAS_ALLOC.size) == (24, 12, 8, 12)
assert (IOVA_RANGES.size, IOVA_RANGE.size, MAP.size, MAP_FILE.size) == (32, 16, 40, 40)
assert (UNMAP.size, HWPT_ALLOC.size, HW_INFO.size) == (24, 40, 40)
assert (SET_DIRTY_TRACKING.size, GET_DIRTY_BITMAP.size) == (16, 48)

_BIND_TOKEN: Final = 1 << 0
_MAP_FIXED: Final = 1 << 0
_MAP_ACCESS: Final = {
    DmaAccess.WRITE: 1 << 1,
    DmaAccess.READ: 1 << 2,
}
_HWPT_DIRTY_TRACKING: Final = 1 << 1
_HW_CAP_DIRTY_TRACKING: Final = 1 << 0
_DIRTY_NO_CLEAR: Final = 1 << 0
MAX_IOVA: Final = (1 << 64) - 1


class IommufdIoctl(enum.IntEnum):
    """Calls on /dev/iommu."""

    DESTROY = 0x3B80
    IOAS_ALLOC = 0x3B81
    IOAS_IOVA_RANGES = 0x3B84
    IOAS_MAP = 0x3B85
    IOAS_UNMAP = 0x3B86
    HWPT_ALLOC = 0x3B89
    GET_HW_INFO = 0x3B8A
    HWPT_SET_DIRTY_TRACKING = 0x3B8B
    HWPT_GET_DIRTY_BITMAP = 0x3B8C
    IOAS_MAP_FILE = 0x3B8F


# --- the device ---------------------------------------------------------------------------------


def encode_bind(iommufd: int, token_address: int | None = None) -> bytearray:
    """`token_address` is where 16 bytes of ours are that are the token, if one is needed."""
    if token_address is None:
        return bytearray(BIND.pack(BIND_WITHOUT_TOKEN_SIZE, 0, iommufd, 0, 0))[
            :BIND_WITHOUT_TOKEN_SIZE
        ]
    return bytearray(BIND.pack(BIND.size, _BIND_TOKEN, iommufd, 0, token_address))


def decode_bind(answer: bytearray) -> int:
    """The device's number on the iommufd."""
    return int(struct.unpack_from("=I", answer, 12)[0])


def encode_attach(pt_id: int) -> bytearray:
    return bytearray(ATTACH.pack(ATTACH.size, 0, pt_id))


# --- objects ------------------------------------------------------------------------------------


def encode_destroy(object_id: int) -> bytearray:
    return bytearray(DESTROY.pack(DESTROY.size, object_id))


def encode_ioas_alloc() -> bytearray:
    return bytearray(IOAS_ALLOC.pack(IOAS_ALLOC.size, 0, 0))


def decode_ioas_alloc(answer: bytearray) -> int:
    return int(IOAS_ALLOC.unpack_from(answer)[2])


def encode_hwpt_alloc(device: int, ioas: int) -> bytearray:
    """A page table with dirty tracking."""
    return bytearray(
        HWPT_ALLOC.pack(HWPT_ALLOC.size, _HWPT_DIRTY_TRACKING, device, ioas, 0, 0, 0, 0, 0)
    )


def decode_hwpt_alloc(answer: bytearray) -> int:
    return int(HWPT_ALLOC.unpack_from(answer)[4])


def encode_hw_info(device: int) -> bytearray:
    return bytearray(HW_INFO.pack(HW_INFO.size, 0, device, 0, 0, 0, 0, 0))


def decode_tracks_dirty(answer: bytearray) -> bool:
    """Of the answer to GET_HW_INFO: can the IOMMU track dirty pages?"""
    return bool(HW_INFO.unpack_from(answer)[7] & _HW_CAP_DIRTY_TRACKING)


# --- addresses ----------------------------------------------------------------------------------


def encode_iova_ranges(ioas: int, room: int, address: int) -> bytearray:
    """`address` is where there is room for so many ranges of 16 bytes."""
    return bytearray(IOVA_RANGES.pack(IOVA_RANGES.size, ioas, room, 0, address, 0))


def decode_iova_ranges(answer: bytearray) -> tuple[int, int]:
    """How many ranges there are, and what addresses have to be aligned to."""
    _, _, count, _, _, alignment = IOVA_RANGES.unpack_from(answer)
    return count, alignment


def encode_map(ioas: int, iova: int, size: int, access: DmaAccess, address: int) -> bytearray:
    """Bytes of our memory from `address` on."""
    return bytearray(MAP.pack(MAP.size, _flags(access), ioas, 0, address, size, iova))


def encode_map_file(
    ioas: int, iova: int, size: int, access: DmaAccess, fd: int, offset: int
) -> bytearray:
    """Bytes from `offset` on of the file behind `fd`."""
    return bytearray(MAP_FILE.pack(MAP_FILE.size, _flags(access), ioas, fd, offset, size, iova))


def _flags(access: DmaAccess) -> int:
    return _MAP_FIXED | sum(bit for wanted, bit in _MAP_ACCESS.items() if access & wanted)


def encode_unmap(ioas: int, iova: int, size: int) -> bytearray:
    return bytearray(UNMAP.pack(UNMAP.size, ioas, iova, size))


def encode_unmap_all(ioas: int) -> bytearray:
    return encode_unmap(ioas, 0, MAX_IOVA)


# --- dirty tracking -----------------------------------------------------------------------------


def encode_set_dirty_tracking(hwpt: int, on: bool) -> bytearray:
    return bytearray(SET_DIRTY_TRACKING.pack(SET_DIRTY_TRACKING.size, int(on), hwpt, 0))


def encode_get_dirty_bitmap(
    hwpt: int, iova: int, size: int, page_size: int, address: int, *, clear: bool
) -> bytearray:
    """`address` is where there is a bit for each page, 0 so far, in whole u64 words."""
    flags = 0 if clear else _DIRTY_NO_CLEAR
    return bytearray(
        GET_DIRTY_BITMAP.pack(GET_DIRTY_BITMAP.size, hwpt, flags, 0, iova, size, page_size, address)
    )


def decode_range_list(data: bytes | bytearray) -> tuple[tuple[int, int], ...]:
    """The (first, last) pairs that IOAS_IOVA_RANGES filled in."""
    return tuple(IOVA_RANGE.iter_unpack(data))
