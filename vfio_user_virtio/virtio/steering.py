"""Automatic receive steering: a flow is received on the queue pair that it was last sent on
(virtio 1.4, Network Device, Automatic receive steering in multiqueue mode).

A flow is known by a small hash that is the same for both directions, so what the driver sends
teaches where the answers go.  Flows that share a slot share a queue; nothing is ever reordered
within one.  Kept to IPv4 without options and IPv6 without extension headers: all else is one flow.
"""

from __future__ import annotations

import struct
from typing import Final

SLOTS: Final = 256
_IPV4: Final = struct.Struct("!IIHH")
_IPV6: Final = struct.Struct("!QQQQHH")
_ETHERTYPE: Final = struct.Struct("!H")
_ETH: Final = 14
_VLAN_TAG: Final = 4
_TCP_UDP: Final = (6, 17)


def flow_slot(frame: bytes | memoryview) -> int:
    """The slot, 0 … SLOTS - 1, of a frame given from its Ethernet header on; any length is fine."""
    if len(frame) < _ETH + _VLAN_TAG:
        return 0
    (kind,) = _ETHERTYPE.unpack_from(frame, 12)
    start = _ETH
    if kind == 0x8100:
        (kind,) = _ETHERTYPE.unpack_from(frame, 16)
        start = _ETH + _VLAN_TAG
    if kind == 0x0800 and len(frame) >= start + 24 and frame[start] == 0x45:
        source, destination, port, other = _IPV4.unpack_from(frame, start + 12)
        mixed: int = source ^ destination
        if frame[start + 9] in _TCP_UDP:
            mixed ^= port ^ other
        return (mixed ^ mixed >> 8 ^ mixed >> 16) % SLOTS
    if kind == 0x86DD and len(frame) >= start + 44:
        high, low, other_high, other_low, port, other = _IPV6.unpack_from(frame, start + 8)
        mixed = high ^ low ^ other_high ^ other_low
        if frame[start + 6] in _TCP_UDP:
            mixed ^= port ^ other
        return (mixed ^ mixed >> 8 ^ mixed >> 32 ^ mixed >> 40) % SLOTS
    return 0


class Steering:
    """Which of `pairs` queue pairs each slot belongs to.

    >>> steering = Steering()
    >>> steering.resize(4)
    >>> steering.sent(17, 3)
    >>> steering.pair_for(17)
    3
    """

    def __init__(self) -> None:
        self.pairs = 1
        self._table = [0] * SLOTS

    def resize(self, pairs: int) -> None:
        """Use `pairs` pairs from now on; slots are spread over them until taught better."""
        self.pairs = pairs
        self._table = [slot % pairs for slot in range(SLOTS)]

    def sent(self, slot: int, pair: int) -> None:
        """The driver sent a frame of `slot` on `pair`."""
        if pair < self.pairs:
            self._table[slot] = pair

    def pair_for(self, slot: int) -> int:
        """The pair to receive a frame of `slot` on."""
        return self._table[slot]
