"""Values of virtio-net's own parts, CVQ_CFG (virtio 1.4, Network Device, Device parts; Control
Virtqueue), and of any part of a virtio-net device.

A value is the data of the control command that the selector names, as if it had just been given.
Little-endian:

- RX_…: u8, 0 or 1
- MAC_TABLE_SET: u32 count and 6-byte addresses, unicast, then the same of multicast
- MAC_ADDR_SET: 6 bytes
- VLAN_ADD: the whole table, for which the standard gives no format: array of u16 ids.  A bitmap of
  4,096 bits was rejected: the part has the selector of a command whose data is one id
- ANNOUNCE_ACK: nothing
- MQ_VQ_PAIRS_SET: u16
- MQ_RSS_CONFIG: ``0`` u32 hash_types, ``4`` u16 indirection_table_mask (t - 1), ``6`` u16
  unclassified_queue, ``8`` t times u16, then u16 max_tx_vq, u8 key length k, k bytes of key
- MQ_HASH_CONFIG: ``0`` u32 hash_types, ``4`` 8 reserved, ``12`` u8 key length k, ``13`` the key

In no part: guest offloads, coalescing, tunnel hashes, statistics, RSS contexts, link state and the
ANNOUNCE status bit.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from vfio_user_virtio.virtio.common_parts import (
    VqCfg,
    VqNotifyCfg,
    decode_common_cfg_untrusted,
    decode_device_status_untrusted,
    decode_features_untrusted,
    decode_vq_cfg_untrusted,
    decode_vq_notify_cfg_untrusted,
)
from vfio_user_virtio.virtio.part_header import ControlCommand, PartType, control_selector
from vfio_user_virtio.virtio.parts import Part
from vfio_user_virtio.virtio.rx_filter import MAX_VLAN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_COUNT: Final = struct.Struct("<I")
_U16: Final = struct.Struct("<H")
_RSS_HEAD: Final = struct.Struct("<IHH")
_RSS_TAIL: Final = struct.Struct("<HB")
_HASH: Final = struct.Struct("<I8xB")
MAC_SIZE: Final = 6
assert (_RSS_HEAD.size, _RSS_TAIL.size, _HASH.size) == (8, 3, 13)


@attrs.frozen
class MacTable:
    """The value of MAC_TABLE_SET: addresses of 6 bytes, in the driver's order."""

    unicast: tuple[bytes, ...] = ()
    multicast: tuple[bytes, ...] = ()


@attrs.frozen
class RssConfig:
    """The value of MQ_RSS_CONFIG; `indirection_table` has a power of two of entries, each an RX
    queue's index / 2, as `unclassified_queue` is."""

    hash_types: int
    unclassified_queue: int
    indirection_table: tuple[int, ...]
    max_tx_vq: int
    hash_key: bytes


@attrs.frozen
class HashConfig:
    """The value of MQ_HASH_CONFIG."""

    hash_types: int
    hash_key: bytes


ControlValue: TypeAlias = int | bytes | MacTable | frozenset[int] | RssConfig | HashConfig
"""RX_… and MQ_VQ_PAIRS_SET are numbers, MAC_ADDR_SET and ANNOUNCE_ACK bytes, VLAN_ADD a set."""

PartValue: TypeAlias = ControlValue | VqCfg | VqNotifyCfg
"""Features, registers and the status are numbers; a part that is not defined is bytes."""


def rx_part(command: ControlCommand, *, on: bool) -> Part:
    """One of the RX_… switches."""
    return _part(command, bytes((on,)))


def _decode_switch_untrusted(part: Part) -> int:
    part.require_size(1)
    if part.value[0] > 1:
        raise part.refuse(f"it is {part.value[0]}, not 0 or 1")
    return part.value[0]


def mac_table_part(table: MacTable) -> Part:
    """Both filter tables."""
    raw = bytearray()
    for addresses in (table.unicast, table.multicast):
        raw += _COUNT.pack(len(addresses))
        raw += b"".join(addresses)
    return _part(ControlCommand.MAC_TABLE_SET, bytes(raw))


def decode_mac_table_untrusted(part: Part) -> MacTable:
    """Both tables, however long.  Raises PartsError."""
    unicast, end = _decode_addresses_untrusted(part, 0)
    multicast, end = _decode_addresses_untrusted(part, end)
    part.require_size(end)
    return MacTable(unicast, multicast)


def _decode_addresses_untrusted(part: Part, offset: int) -> tuple[tuple[bytes, ...], int]:
    start = offset + _COUNT.size
    if start > len(part.value):
        raise part.refuse(f"its value of {len(part.value)} bytes ends before the second table")
    (count,) = _COUNT.unpack_from(part.value, offset)
    end = start + MAC_SIZE * count
    if end > len(part.value):
        raise part.refuse(
            f"a table of {count} addresses needs {end} bytes, the value has {len(part.value)}"
        )
    return tuple(part.value[i : i + MAC_SIZE] for i in range(start, end, MAC_SIZE)), end


def mac_addr_part(mac: bytes) -> Part:
    """The device's own address, 6 bytes."""
    return _part(ControlCommand.MAC_ADDR_SET, mac)


def _decode_mac_untrusted(part: Part) -> bytes:
    part.require_size(MAC_SIZE)
    return part.value


def vlan_part(vlans: Iterable[int]) -> Part:
    """The whole table of VLANs, ascending."""
    return _part(ControlCommand.VLAN_ADD, b"".join(map(_U16.pack, sorted(vlans))))


def decode_vlans_untrusted(part: Part) -> frozenset[int]:
    """Ids from 0 to 4095, in any order.  Raises PartsError."""
    size = len(part.value)
    if size % _U16.size:
        raise part.refuse(f"its value has {size} bytes, which are not ids of 2")
    if size > _U16.size * (MAX_VLAN + 1):
        raise part.refuse(f"it has {size // 2} ids; there are no more than {MAX_VLAN + 1} VLANs")
    vlans = frozenset(vlan for (vlan,) in _U16.iter_unpack(part.value))
    if vlans and max(vlans) > MAX_VLAN:
        raise part.refuse(f"VLAN {max(vlans)} is above {MAX_VLAN}")
    return vlans


def announce_ack_part() -> Part:
    """That the driver has announced itself."""
    return _part(ControlCommand.ANNOUNCE_ACK, b"")


def _decode_nothing_untrusted(part: Part) -> bytes:
    part.require_size(0)
    return part.value


def vq_pairs_part(pairs: int) -> Part:
    """How many queue pairs are in use."""
    return _part(ControlCommand.MQ_VQ_PAIRS_SET, _U16.pack(pairs))


def _decode_u16_untrusted(part: Part) -> int:
    part.require_size(_U16.size)
    return int(_U16.unpack(part.value)[0])


def rss_part(config: RssConfig) -> Part:
    table = config.indirection_table
    value = b"".join(
        (
            _RSS_HEAD.pack(config.hash_types, len(table) - 1, config.unclassified_queue),
            *map(_U16.pack, table),
            _RSS_TAIL.pack(config.max_tx_vq, len(config.hash_key)),
            config.hash_key,
        )
    )
    return _part(ControlCommand.MQ_RSS_CONFIG, value)


def decode_rss_untrusted(part: Part) -> RssConfig:
    """Raises PartsError."""
    _require_at_least(part, _RSS_HEAD.size)
    hash_types, mask, unclassified_queue = _RSS_HEAD.unpack_from(part.value)
    if mask & (mask + 1):
        raise part.refuse(f"indirection_table_mask is {mask:#x}, not a power of two less 1")
    table_end = _RSS_HEAD.size + _U16.size * (mask + 1)
    _require_at_least(part, table_end + _RSS_TAIL.size)
    table = struct.unpack_from(f"<{mask + 1}H", part.value, _RSS_HEAD.size)
    max_tx_vq, key_size = _RSS_TAIL.unpack_from(part.value, table_end)
    key_start = table_end + _RSS_TAIL.size
    part.require_size(key_start + key_size)
    return RssConfig(hash_types, unclassified_queue, table, max_tx_vq, part.value[key_start:])


def hash_part(config: HashConfig) -> Part:
    value = _HASH.pack(config.hash_types, len(config.hash_key)) + config.hash_key
    return _part(ControlCommand.MQ_HASH_CONFIG, value)


def decode_hash_untrusted(part: Part) -> HashConfig:
    """Raises PartsError."""
    _require_at_least(part, _HASH.size)
    hash_types, key_size = _HASH.unpack_from(part.value)
    part.require_size(_HASH.size + key_size)
    return HashConfig(hash_types, part.value[_HASH.size :])


def _require_at_least(part: Part, size: int) -> None:
    if len(part.value) < size:
        raise part.refuse(f"its value has {len(part.value)} bytes, at least {size} are needed")


def _part(command: ControlCommand, value: bytes) -> Part:
    return Part(PartType.CVQ_CFG, value, control_selector(command))


# --- any part -----------------------------------------------------------------------------------


def decode_value_untrusted(part: Part) -> PartValue:
    """The value of any part of a virtio-net device; that of a part which is not defined, and of a
    control command that no part may carry, is the bytes as they are.  Raises PartsError."""
    control = part.header.control if part.type == PartType.CVQ_CFG else None
    if control is not None:
        return decode_control_untrusted(control, part)
    decode = _DECODERS.get(part.type)
    return part.value if decode is None else decode(part)


def decode_control_untrusted(command: ControlCommand, part: Part) -> ControlValue:
    """The value of a CVQ_CFG part, which is of `command`.  Raises PartsError."""
    return _CONTROL_DECODERS[command](part)


_DECODERS: Final[Mapping[int, Callable[[Part], PartValue]]] = {
    PartType.DEV_FEATURES: decode_features_untrusted,
    PartType.DRV_FEATURES: decode_features_untrusted,
    PartType.PCI_COMMON_CFG: decode_common_cfg_untrusted,
    PartType.DEVICE_STATUS: decode_device_status_untrusted,
    PartType.VQ_CFG: decode_vq_cfg_untrusted,
    PartType.VQ_NOTIFY_CFG: decode_vq_notify_cfg_untrusted,
}

_CONTROL_DECODERS: Final[Mapping[ControlCommand, Callable[[Part], ControlValue]]] = {
    ControlCommand.RX_PROMISC: _decode_switch_untrusted,
    ControlCommand.RX_ALLMULTI: _decode_switch_untrusted,
    ControlCommand.RX_ALLUNI: _decode_switch_untrusted,
    ControlCommand.RX_NOMULTI: _decode_switch_untrusted,
    ControlCommand.RX_NOUNI: _decode_switch_untrusted,
    ControlCommand.RX_NOBCAST: _decode_switch_untrusted,
    ControlCommand.MAC_TABLE_SET: decode_mac_table_untrusted,
    ControlCommand.MAC_ADDR_SET: _decode_mac_untrusted,
    ControlCommand.VLAN_ADD: decode_vlans_untrusted,
    ControlCommand.ANNOUNCE_ACK: _decode_nothing_untrusted,
    ControlCommand.MQ_VQ_PAIRS_SET: _decode_u16_untrusted,
    ControlCommand.MQ_RSS_CONFIG: decode_rss_untrusted,
    ControlCommand.MQ_HASH_CONFIG: decode_hash_untrusted,
}
