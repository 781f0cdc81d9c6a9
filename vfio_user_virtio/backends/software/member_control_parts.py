"""The parts of what a member's driver has set by control commands, CVQ_CFG (virtio 1.4, Network
Device, Device parts): given, and put in.

There is a part for each command that the member offers.  ANNOUNCE_ACK is taken but never given: the
standard has no part for an announcement that is still to be acknowledged, so its absence says
nothing.  A table of addresses that was too long to be kept is given as one that is too long, made
of placeholders: wherever it is set it lets all addresses of its kind through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_parts import (
    MacTable,
    decode_mac_table_untrusted,
    decode_value_untrusted,
    decode_vlans_untrusted,
    mac_addr_part,
    mac_table_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import ControlCommand

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.virtio.net_control import NetState
    from vfio_user_virtio.virtio.parts import Part
    from vfio_user_virtio.virtio.rx_filter import FilterState

_SWITCHES: Final[Mapping[ControlCommand, str]] = {
    ControlCommand.RX_PROMISC: "promisc",
    ControlCommand.RX_ALLMULTI: "allmulti",
    ControlCommand.RX_ALLUNI: "alluni",
    ControlCommand.RX_NOMULTI: "nomulti",
    ControlCommand.RX_NOUNI: "nouni",
    ControlCommand.RX_NOBCAST: "nobcast",
}

_NEEDS: Final[Mapping[ControlCommand, Feature]] = {
    ControlCommand.RX_PROMISC: Feature.CTRL_RX,
    ControlCommand.RX_ALLMULTI: Feature.CTRL_RX,
    ControlCommand.RX_ALLUNI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOMULTI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOUNI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOBCAST: Feature.CTRL_RX_EXTRA,
    ControlCommand.MAC_TABLE_SET: Feature.CTRL_RX,
    ControlCommand.MAC_ADDR_SET: Feature.CTRL_MAC_ADDR,
    ControlCommand.VLAN_ADD: Feature.CTRL_VLAN,
    ControlCommand.ANNOUNCE_ACK: Feature.GUEST_ANNOUNCE,
    ControlCommand.MQ_VQ_PAIRS_SET: Feature.MQ,
    ControlCommand.MQ_RSS_CONFIG: Feature.RSS,
    ControlCommand.MQ_HASH_CONFIG: Feature.HASH_REPORT,
}
"""The feature that each command needs, in the order of the parts."""

_TOO_LONG: Final = limits.MAX_MAC_TABLE + 1
_PLACEHOLDERS: Final = tuple(b"\x02\0\0\0" + n.to_bytes(2, "big") for n in range(_TOO_LONG))
_GROUP_PLACEHOLDERS: Final = tuple(b"\x03\0\0\0" + n.to_bytes(2, "big") for n in range(_TOO_LONG))


def control_parts(offered: int, net: NetState) -> list[Part]:
    """The CVQ_CFG parts of a member that offers `offered`, in their order."""
    return [
        _part(command, net)
        for command, feature in _NEEDS.items()
        if offered >> feature & 1 and command is not ControlCommand.ANNOUNCE_ACK
    ]


def put_control_part_untrusted(offered: int, net: NetState, part: Part) -> None:
    """Change `net` as a CVQ_CFG part says.  Raises PartsError, having changed nothing."""
    command = part.header.control
    if command is None:
        raise part.refuse("no control command that a part may carry has this number")
    feature = _NEEDS[command]
    if not offered >> feature & 1:
        raise part.refuse(f"this device does not offer {feature.name}")
    if len(part.value) > limits.MAX_CONTROL_SIZE:
        raise part.refuse(
            f"its value has {len(part.value)} bytes; a control command has at most "
            f"{limits.MAX_CONTROL_SIZE}"
        )
    if command is ControlCommand.MAC_TABLE_SET:
        table = decode_mac_table_untrusted(part)
        net.filter.set_tables(list(table.unicast), list(table.multicast))
    elif command is ControlCommand.VLAN_ADD:
        net.filter.vlans = set(decode_vlans_untrusted(part))
    else:
        _put_scalar(net, command, part)


def _put_scalar(net: NetState, command: ControlCommand, part: Part) -> None:
    value = decode_value_untrusted(part)
    if isinstance(value, bytes):
        if command is ControlCommand.MAC_ADDR_SET:
            net.filter.mac = value
        else:
            net.announce = False
    elif isinstance(value, int):
        if command is not ControlCommand.MQ_VQ_PAIRS_SET:
            setattr(net.filter, _SWITCHES[command], bool(value))
        elif 1 <= value <= net.max_queue_pairs:
            net.queue_pairs = value
        else:
            raise part.refuse(f"{value} queue pairs; this device has 1 to {net.max_queue_pairs}")


def _part(command: ControlCommand, net: NetState) -> Part:
    match command:
        case ControlCommand.MAC_TABLE_SET:
            return mac_table_part(_tables(net.filter))
        case ControlCommand.MAC_ADDR_SET:
            return mac_addr_part(net.filter.mac)
        case ControlCommand.VLAN_ADD:
            return vlan_part(net.filter.vlans)
        case ControlCommand.MQ_VQ_PAIRS_SET:
            return vq_pairs_part(net.queue_pairs)
        case _:
            return rx_part(command, on=bool(getattr(net.filter, _SWITCHES[command])))


def _tables(rules: FilterState) -> MacTable:
    return MacTable(
        _PLACEHOLDERS if rules.unicast_overflow else tuple(sorted(rules.unicast)),
        _GROUP_PLACEHOLDERS if rules.multicast_overflow else tuple(sorted(rules.multicast)),
    )
