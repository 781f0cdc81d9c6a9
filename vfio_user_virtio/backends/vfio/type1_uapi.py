"""What the kernel and a user of VFIO say to each other about a container: linux/vfio.h, type 1.

As in `uapi`: native byte order, u32 if nothing else is said, offsets in bytes.

- IOMMU info, 24 and capabilities: ``0`` argsz, ``4`` flags (1 page sizes, 2 capabilities), ``8``
  u64 iova_pgsizes (a mask), ``16`` cap_offset, ``20`` padding.  Capability 1, allowed addresses:
  ``8`` nr_iovas, ``12`` reserved, then u64 first and u64 last of each range.  Capability 3,
  mappings left: ``8`` avail.
- map, 32: ``0`` argsz, ``4`` flags (1 read, 2 write), ``8`` u64 vaddr, ``16`` u64 iova, ``24`` u64
  size
- unmap, 24: ``0`` argsz, ``4`` flags (2 all), ``8`` u64 iova, ``16`` u64 size, answered with what
  was unmapped.  Mappings are unmapped whole or not at all (type1v2).

Source: Linux, include/uapi/linux/vfio.h, "API for Type1 VFIO IOMMU".
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio.kernel import malformed
from vfio_user_virtio.backends.vfio.uapi import CAPABILITY, walk_capabilities

if TYPE_CHECKING:
    from vfio_user_virtio.device import DmaAccess

IOMMU_INFO: Final = struct.Struct("=IIQII")
MAP_DMA: Final = struct.Struct("=IIQQQ")
UNMAP_DMA: Final = struct.Struct("=IIQQ")
_COUNT: Final = struct.Struct("=II")
_RANGE: Final = struct.Struct("=QQ")
assert (IOMMU_INFO.size, MAP_DMA.size, UNMAP_DMA.size) == (24, 32, 24)
assert (_COUNT.size, _RANGE.size) == (8, 16)

_INFO_CAPS: Final = 1 << 1
_UNMAP_ALL: Final = 1 << 1
_CAP_IOVA_RANGES: Final = 1
_CAP_DMA_AVAIL: Final = 3


class ContainerIoctl(enum.IntEnum):
    """Calls on /dev/vfio/vfio.  Some of the numbers mean other things on a device."""

    GET_API_VERSION = 0x3B64
    CHECK_EXTENSION = 0x3B65
    SET_IOMMU = 0x3B66
    IOMMU_GET_INFO = 0x3B70
    IOMMU_MAP_DMA = 0x3B71
    IOMMU_UNMAP_DMA = 0x3B72


class IommuType(enum.IntEnum):
    """What SET_IOMMU takes; also extensions to ask for."""

    TYPE1V2 = 3
    NOIOMMU = 8


class Extension(enum.IntEnum):
    """Further extensions to ask for."""

    UNMAP_ALL = 9


@attrs.frozen
class IommuInfo:
    """`page_sizes` is a mask; `ranges` are (first, last); `mappings_left` is None if not told."""

    page_sizes: int
    ranges: tuple[tuple[int, int], ...] = ()
    mappings_left: int | None = None


def encode_iommu_info(argsz: int = IOMMU_INFO.size) -> bytearray:
    request = bytearray(argsz)
    IOMMU_INFO.pack_into(request, 0, argsz, 0, 0, 0, 0)
    return request


def decode_iommu_info(answer: bytearray) -> IommuInfo:
    """Raises HostError for capabilities that are not inside the answer."""
    what = "IOMMU_GET_INFO"
    _, flags, page_sizes, cap_offset, _ = IOMMU_INFO.unpack_from(answer)
    ranges: tuple[tuple[int, int], ...] = ()
    left = None
    if flags & _INFO_CAPS:
        for number, position in walk_capabilities(answer, cap_offset, IOMMU_INFO.size, what):
            start = position + CAPABILITY.size
            if number == _CAP_DMA_AVAIL and start + 4 <= len(answer):
                (left,) = struct.unpack_from("=I", answer, start)
            elif number == _CAP_IOVA_RANGES:
                ranges = _decode_ranges(answer, start, what)
    return IommuInfo(page_sizes, ranges, left)


def _decode_ranges(answer: bytearray, start: int, what: str) -> tuple[tuple[int, int], ...]:
    body = start + _COUNT.size
    count = _COUNT.unpack_from(answer, start)[0] if body <= len(answer) else 0
    if not body + count * _RANGE.size <= len(answer):
        raise malformed(what, f"{count} ranges at {start} of {len(answer)} bytes")
    return tuple(_RANGE.iter_unpack(answer[body : body + count * _RANGE.size]))


def encode_map(iova: int, size: int, access: DmaAccess, address: int) -> bytearray:
    """Bytes of our memory from `address` on; the access bits are the kernel's as they are."""
    return bytearray(MAP_DMA.pack(MAP_DMA.size, access, address, iova, size))


def encode_unmap(iova: int, size: int) -> bytearray:
    return bytearray(UNMAP_DMA.pack(UNMAP_DMA.size, 0, iova, size))


def encode_unmap_all() -> bytearray:
    return bytearray(UNMAP_DMA.pack(UNMAP_DMA.size, _UNMAP_ALL, 0, 0))


def decode_unmapped(answer: bytearray) -> int:
    """How many bytes were unmapped."""
    return int(UNMAP_DMA.unpack_from(answer)[3])
