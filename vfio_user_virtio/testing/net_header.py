"""struct virtio_net_hdr as a test writes and reads it (virtio 1.4, Network Device, Device
Operation): flags u8, gso_type u8, hdr_len u16, gso_size u16, csum_start u16, csum_offset u16,
num_buffers u16; 12 bytes, little-endian.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

NET_HEADER: Final = struct.Struct("<BBHHHHH")
NET_HEADER_SIZE: Final = 12
assert NET_HEADER.size == NET_HEADER_SIZE

F_NEEDS_CSUM: Final = 1
F_DATA_VALID: Final = 2
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80


@attrs.frozen
class NetHeader:
    """The header of one frame; offsets and sizes in bytes.  A driver sends num_buffers 0."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def encode(self) -> bytes:
        return NET_HEADER.pack(
            self.flags,
            self.gso_type,
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        )


def decode_net_header(data: bytes | memoryview) -> NetHeader:
    """Decode the first 12 bytes of `data`; raises ValueError if there are fewer."""
    if len(data) < NET_HEADER_SIZE:
        raise ValueError(f"{len(data)} bytes hold no virtio_net_hdr of {NET_HEADER_SIZE}")
    return NetHeader(*NET_HEADER.unpack_from(data))


NO_OFFLOAD: Final = NetHeader()
"""The header of a frame that is finished."""
