"""Which frames a virtio-net device hands to its driver (virtio 1.4, Network Device, Packet
Receive Filtering, Setting MAC Address Filtering, VLAN Filtering).

`FilterState` is what control commands set, as plain data; `accepts` answers for it.  A device
starts promiscuous, as QEMU's does, since a driver without CTRL_RX has no way to ask for anything.
The table of VLANs is empty at first, so that with CTRL_VLAN no tagged frame passes until one is
added.
"""

from __future__ import annotations

from typing import Final

import attrs

from vfio_user_virtio import limits

BROADCAST: Final = b"\xff" * 6
MAX_VLAN: Final = 4_095


@attrs.define
class FilterState:
    """What the driver has asked for.  A table longer than the limit means: all such addresses."""

    mac: bytes
    promisc: bool = True
    allmulti: bool = False
    alluni: bool = False
    nomulti: bool = False
    nouni: bool = False
    nobcast: bool = False
    unicast: frozenset[bytes] = frozenset()
    multicast: frozenset[bytes] = frozenset()
    unicast_overflow: bool = False
    multicast_overflow: bool = False
    vlans: set[int] = attrs.field(factory=set)
    filter_vlans: bool = False
    """Whether CTRL_VLAN was negotiated."""

    def set_tables(self, unicast: list[bytes], multicast: list[bytes]) -> None:
        """MAC_TABLE_SET; a table that does not fit lets all of its kind through."""
        self.unicast_overflow = len(unicast) > limits.MAX_MAC_TABLE
        self.multicast_overflow = len(multicast) > limits.MAX_MAC_TABLE
        self.unicast = frozenset() if self.unicast_overflow else frozenset(unicast)
        self.multicast = frozenset() if self.multicast_overflow else frozenset(multicast)


def accepts(state: FilterState, destination: bytes, vlan: int | None) -> bool:
    """Whether a frame to `destination` (6 bytes), tagged with `vlan` or untagged, passes."""
    if state.promisc:
        return True
    if vlan is not None and state.filter_vlans and vlan not in state.vlans:
        return False
    if destination == BROADCAST:
        return not state.nobcast
    if destination[0] & 1:
        if state.nomulti:
            return False
        return state.allmulti or state.multicast_overflow or destination in state.multicast
    if state.nouni:
        return False
    return (
        destination == state.mac
        or state.alluni
        or state.unicast_overflow
        or destination in state.unicast
    )
