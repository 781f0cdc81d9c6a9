"""VFIO_USER_DEVICE_GET_REGION_INFO: a region's size, flags, and how it may be mapped.

Source: vfio-user, VFIO_USER_DEVICE_GET_REGION_INFO.  Payload, both ways, little-endian:

- ``0`` u32 argsz: the largest reply the client takes; in the reply, the size that is needed
- ``4`` u32 flags: `RegionFlags` (reply)
- ``8`` u32 index
- ``12`` u32 cap_offset: of the first capability from the payload's start (reply)
- ``16`` u64 size (reply)
- ``24`` u64 offset: of the region in the fd that comes with the reply (reply)

With flag CAPS a chain of capabilities follows.  Each starts on 8 bytes with u16 id, u16 version,
u32 next (from the payload's start; 0 ends the chain).  Known are

- id 1, version 1, sparse mmap: ``+8`` u32 nr_areas, ``+12`` u32 reserved, and nr_areas times
  u64 offset, u64 size.  QEMU maps an area at fd offset `offset` + area offset.
- id 2, version 1, type: ``+8`` u32 type, ``+12`` u32 subtype.

The argsz rule: a reply that would exceed the request's argsz is cut to the fixed part, without
flag CAPS (QEMU takes that for a lie), and says in argsz how much to ask for.  The fd travels with
the complete reply only: QEMU asks twice, and would close the first.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import RegionFlags, RegionInfo, SparseArea
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.checks import (
    distrust,
    require_argsz,
    require_reply,
    require_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.header import Buffer

REGION_INFO: Final = struct.Struct("<IIIIQQ")
REGION_INFO_SIZE: Final = 32
assert REGION_INFO.size == REGION_INFO_SIZE

CAPABILITY: Final = struct.Struct("<HHI")
CAPABILITY_SIZE: Final = 8
assert CAPABILITY.size == CAPABILITY_SIZE

SPARSE_MMAP: Final = struct.Struct("<II")
SPARSE_AREA: Final = struct.Struct("<QQ")
assert (SPARSE_MMAP.size, SPARSE_AREA.size) == (8, 16)

CAP_SPARSE_MMAP: Final = 1
CAP_TYPE: Final = 2

_CAPS: Final = int(RegionFlags.CAPS)
_NAME: Final = "DEVICE_GET_REGION_INFO"


@attrs.frozen
class RegionInfoRequest:
    """Which region, and the largest reply payload that is taken, in bytes."""

    index: int
    argsz: int = REGION_INFO_SIZE


@attrs.frozen
class RegionCapability:
    """One capability of a chain, its header apart: `data` is what follows the 8 bytes."""

    id: int
    version: int
    data: bytes


@attrs.frozen
class RegionInfoReply:
    """What a server says of region `index`.

    `info.fd` is None: fds travel beside the payload.  If `argsz` is larger than the reply, the
    server wants to be asked again with that argsz.  `capabilities` are all but the sparse areas.
    """

    argsz: int
    index: int
    info: RegionInfo
    capabilities: tuple[RegionCapability, ...] = ()


def encode_region_info_request(index: int, argsz: int = REGION_INFO_SIZE) -> bytes:
    return REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


def decode_region_info_request_untrusted(payload: Buffer) -> RegionInfoRequest:
    """Raises ClientError(EINVAL)."""
    require_request(payload, REGION_INFO_SIZE, _NAME)
    argsz, _, index, _, _, _ = REGION_INFO.unpack_from(payload)
    require_argsz(argsz, REGION_INFO_SIZE, _NAME)
    return RegionInfoRequest(index, argsz)


def encode_region_info_reply(
    request: RegionInfoRequest, info: RegionInfo, capabilities: Sequence[RegionCapability] = ()
) -> tuple[bytes, list[int]]:
    """The payload and the fds to send with it: at most one, and still the device's."""
    chain = _encode_chain(info, capabilities)
    needed = REGION_INFO_SIZE + len(chain)
    complete = needed <= request.argsz
    flags = int(info.flags) & ~_CAPS
    cap_offset = 0
    if complete and chain:
        flags |= _CAPS
        cap_offset = REGION_INFO_SIZE
    payload = REGION_INFO.pack(needed, flags, request.index, cap_offset, info.size, info.fd_offset)
    if not complete:
        return payload, []
    return payload + chain, [] if info.fd is None else [info.fd]


def decode_region_info_reply_untrusted(payload: Buffer) -> RegionInfoReply:
    """Raises ConnectionLost; a chain can neither loop nor leave the payload."""
    require_reply(payload, REGION_INFO_SIZE, _NAME)
    argsz, flags, index, cap_offset, size, offset = REGION_INFO.unpack_from(payload)
    if not REGION_INFO_SIZE <= argsz <= MAX_DATA_XFER_SIZE:
        raise distrust(
            f"the reply to {_NAME} has argsz {argsz}, "
            f"not in {REGION_INFO_SIZE}…{MAX_DATA_XFER_SIZE}"
        )
    areas: list[SparseArea] = []
    others: list[RegionCapability] = []
    if flags & _CAPS:
        for capability in _decode_chain(payload, cap_offset):
            if capability.id == CAP_SPARSE_MMAP:
                areas += _decode_areas(capability.data)
            else:
                others.append(capability)
    info = RegionInfo(size, RegionFlags(flags & ~_CAPS), fd_offset=offset, areas=tuple(areas))
    return RegionInfoReply(argsz, index, info, tuple(others))


def _encode_chain(info: RegionInfo, capabilities: Sequence[RegionCapability]) -> bytes:
    wanted = list(capabilities)
    if info.areas:
        parts = [SPARSE_MMAP.pack(len(info.areas), 0)]
        parts += [SPARSE_AREA.pack(area.offset, area.size) for area in info.areas]
        wanted.insert(0, RegionCapability(CAP_SPARSE_MMAP, 1, b"".join(parts)))
    chain = bytearray()
    for number, capability in enumerate(wanted, 1):
        body = capability.data + bytes(-len(capability.data) % 8)
        end = REGION_INFO_SIZE + len(chain) + CAPABILITY_SIZE + len(body)
        following = 0 if number == len(wanted) else end
        chain += CAPABILITY.pack(capability.id, capability.version, following) + body
    return bytes(chain)


def _decode_chain(payload: Buffer, position: int) -> list[RegionCapability]:
    """Capabilities in the order of the chain, which must go forward."""
    found = []
    lowest = REGION_INFO_SIZE
    while position:
        if position < lowest or position + CAPABILITY_SIZE > len(payload):
            raise distrust(
                f"the reply to {_NAME} has a capability at {position}, "
                f"not between {lowest} and the end at {len(payload)}"
            )
        number, version, following = CAPABILITY.unpack_from(payload, position)
        lowest = position + CAPABILITY_SIZE
        # The data ends where the next capability starts; where that is nonsense, nowhere sensible
        # is its end either, and the next turn refuses the chain.
        end = following or len(payload)
        found.append(RegionCapability(number, version, bytes(payload[lowest:end])))
        position = following
    return found


def _decode_areas(data: bytes) -> list[SparseArea]:
    if len(data) < SPARSE_MMAP.size:
        raise distrust(f"the sparse mmap capability has {len(data)} bytes of data")
    nr_areas, _ = SPARSE_MMAP.unpack_from(data)
    end = SPARSE_MMAP.size + nr_areas * SPARSE_AREA.size
    if end > len(data):
        raise distrust(f"{nr_areas} sparse areas do not fit {len(data)} bytes of data")
    return [SparseArea(*area) for area in SPARSE_AREA.iter_unpack(data[SPARSE_MMAP.size : end])]
