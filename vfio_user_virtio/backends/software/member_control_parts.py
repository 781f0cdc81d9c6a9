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
from vfio_user_virtio.virtio.net_parts import (
    MacTable,
    mac_addr_part,
    mac_table_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import ControlCommand
from vfio_user_virtio.virtio.parts_fit import CONTROL_FEATURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.virtio.net_control import NetState
    from vfio_user_virtio.virtio.net_parts import ControlValue
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

_TOO_LONG: Final = limits.MAX_MAC_TABLE + 1
_PLACEHOLDERS: Final = tuple(b"\x02\0\0\0" + n.to_bytes(2, "big") for n in range(_TOO_LONG))
_GROUP_PLACEHOLDERS: Final = tuple(b"\x03\0\0\0" + n.to_bytes(2, "big") for n in range(_TOO_LONG))


def control_parts(offered: int, net: NetState) -> list[Part]:
    """The CVQ_CFG parts of a member that offers `offered`, in their order."""
    return [
        _part(command, net)
        for command, feature in CONTROL_FEATURES.items()
        if offered >> feature & 1 and command is not ControlCommand.ANNOUNCE_ACK
    ]


def put_control_part(net: NetState, command: ControlCommand, value: ControlValue) -> None:
    """Change `net` as a CVQ_CFG part of `command` says, whose value fits."""
    if isinstance(value, MacTable):
        net.filter.set_tables(list(value.unicast), list(value.multicast))
    elif isinstance(value, frozenset):
        net.filter.vlans = set(value)
    elif isinstance(value, bytes):
        if command is ControlCommand.MAC_ADDR_SET:
            net.filter.mac = value
        else:
            net.announce = False
    elif isinstance(value, int):
        if command is ControlCommand.MQ_VQ_PAIRS_SET:
            net.queue_pairs = value
        else:
            setattr(net.filter, _SWITCHES[command], bool(value))


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
