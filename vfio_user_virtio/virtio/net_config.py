"""The device-specific configuration of virtio-net (virtio 1.4, Network Device, Device configuration
layout): 20 bytes, little-endian, read-only.

mac 6 bytes @0; status u16 @6; max_virtqueue_pairs u16 @8; mtu u16 @10; speed u32 @12 (Mbit/s,
0xffffffff unknown); duplex u8 @16 (1 full, 0 half, 0xff unknown); 3 bytes of the RSS fields, which
are 0 because RSS is not offered.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import attrs

_LAYOUT: Final = struct.Struct("<6sHHHIBBH")
NET_CONFIG_SIZE: Final = 20
assert _LAYOUT.size == NET_CONFIG_SIZE

DUPLEX_FULL: Final = 1
DUPLEX_UNKNOWN: Final = 0xFF


class NetStatus(enum.IntFlag):
    """The status field."""

    LINK_UP = 1
    ANNOUNCE = 2


@attrs.define
class NetConfig:
    """The fields as they stand now; `mtu` is 0 where MTU is not offered."""

    mac: bytes
    status: NetStatus
    max_virtqueue_pairs: int
    mtu: int
    speed: int
    duplex: int

    def encode(self) -> bytes:
        return _LAYOUT.pack(
            self.mac,
            self.status,
            self.max_virtqueue_pairs,
            self.mtu,
            self.speed,
            self.duplex,
            0,
            0,
        )


def decode_net_config(data: bytes) -> NetConfig:
    """Decode `NET_CONFIG_SIZE` bytes; raises ValueError on any other length."""
    if len(data) != NET_CONFIG_SIZE:
        raise ValueError(f"{len(data)} bytes of device configuration; {NET_CONFIG_SIZE} are needed")
    mac, status, pairs, mtu, speed, duplex, _, _ = _LAYOUT.unpack(data)
    return NetConfig(mac, NetStatus(status), pairs, mtu, speed, duplex)
