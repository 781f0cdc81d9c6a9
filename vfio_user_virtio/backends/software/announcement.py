"""How the network learns that a member has moved here: one frame, before the guest says a word.

Switches on the way know the guest's address at its old place, and send there until they see a frame
from the new one.  A reverse ARP request (RFC 903) is what hypervisors send for that: it asks for
nothing that anybody answers, needs no IP address, and is a broadcast, so it reaches every switch.
The driver's own announcement (GUEST_ANNOUNCE) follows when it gets to it, and updates neighbours.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.ports import HEAD_SIZE, NET_HEADER_SIZE

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Frame

_BROADCAST: Final = b"\xff" * 6
_ETHERTYPE_RARP: Final = b"\x80\x35"
_RARP: Final = struct.Struct("!HHBBH6s4s6s4s")
"""hardware type (Ethernet), protocol type (IPv4), their lengths, operation, then hardware and
protocol address of the sender and of the target; big-endian."""
_REQUEST_REVERSE: Final = 3
_MIN_SIZE: Final = 60


def rarp_request(mac: bytes) -> tuple[Frame, int]:
    """A reverse ARP request of `mac` (6 bytes) for itself, as a frame for the switch."""
    body = _RARP.pack(1, 0x0800, 6, 4, _REQUEST_REVERSE, mac, bytes(4), mac, bytes(4))
    ethernet = (_BROADCAST + mac + _ETHERTYPE_RARP + body).ljust(_MIN_SIZE, b"\0")
    whole = bytes(NET_HEADER_SIZE) + ethernet
    return (whole[:HEAD_SIZE], whole[HEAD_SIZE:]), len(whole)
