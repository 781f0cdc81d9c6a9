"""The seam of the switch: frames, and the ports that they go in and out of.

A frame is a scatter list whose bytes are a 12-byte virtio_net_hdr (little-endian; virtio 1.4,
Network Device, Device Operation) and an Ethernet frame.  Its first element is private ``bytes``
and holds the header, the two addresses, the EtherType and a VLAN tag: `HEAD_SIZE` bytes or more,
or the whole frame if that is shorter.  Decisions are made on that copy and that copy is what
travels, so a guest that rewrites its buffer meanwhile changes nothing that was decided.  The other
elements may be views of guest memory: they are used before the call returns and never kept.

Everything here is synchronous and on one thread: a call moves a frame or says that it did not.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

NET_HEADER_SIZE: Final = 12
"""virtio_net_hdr with num_buffers, without hash or tunnel fields."""

MIN_FRAME_SIZE: Final = NET_HEADER_SIZE + 14
"""virtio_net_hdr and an Ethernet header; the switch drops what is shorter."""

HEAD_SIZE: Final = NET_HEADER_SIZE + 18
"""virtio_net_hdr, two addresses, an 802.1Q tag and an EtherType."""

FLOW_SIZE: Final = NET_HEADER_SIZE + 62
"""Enough of a frame to tell its flow: up to the ports of TCP over IPv6 behind a VLAN tag."""

Buffer: TypeAlias = bytes | bytearray | memoryview
Frame: TypeAlias = "Sequence[Buffer]"


def first_bytes(parts: Sequence[Buffer], size: int) -> bytes:
    """A copy of the first `size` bytes of a scatter list, or of all if it has fewer.

    A driver's buffers may have a gigabyte where a frame has a hundred bytes: join nothing whole.
    """
    taken: list[Buffer] = []
    for part in parts:
        if len(part) >= size:
            taken.append(part[:size])
            break
        taken.append(part)
        size -= len(part)
    return b"".join(taken)


def flow_bytes(frame: Frame) -> bytes:
    """A copy of the bytes of a frame that tell its flow, from its Ethernet header on."""
    return first_bytes(frame, FLOW_SIZE)[NET_HEADER_SIZE:]


class Offload(enum.IntFlag):
    """Frames a port can take unfinished; a port is sent nothing else.

    Bit values are those of the virtio-net feature bits GUEST_…, so that a negotiated feature word
    masks straight to this.
    """

    CSUM = 1 << 1
    TSO4 = 1 << 7
    TSO6 = 1 << 8
    ECN = 1 << 9
    USO4 = 1 << 54
    USO6 = 1 << 55


class Port(Protocol):
    """What is plugged into the switch: a member or an uplink.  Told apart by identity."""

    @property
    def name(self) -> str: ...

    @property
    def offloads(self) -> Offload:
        """What this port takes unfinished just now; `Switch.refresh` is called when it changes."""
        ...

    @property
    def up(self) -> bool:
        """Whether frames may be sent here at all (a member's driver is ready, a TAP is there)."""
        ...

    def deliver(self, frame: Frame, size: int) -> bool:
        """Take a frame of `size` bytes, header included; False means no room just now.

        A port that answered False calls `Switch.writable` once it has room.
        """
        ...

    def flush(self) -> None:
        """A batch of deliveries is over: tell the guest, or hand down what was held back."""
        ...


@runtime_checkable
class DirectPort(Port, Protocol):
    """A port whose own memory an uplink may read a frame into, without a copy (a member)."""

    def reserve(self) -> Sequence[memoryview] | None:
        """Room for one largest frame with its header, or None; the same room until `commit`.

        A port that answered None calls `Switch.writable` once it has room.
        """
        ...

    def commit(self, size: int) -> None:
        """The reserved room holds a frame of `size` bytes, header included.

        `num_buffers` of the header is the port's to fill in: the uplink leaves it undefined.
        """
        ...


class Sender(Protocol):
    """Where frames come from, so that it can be told when to go on."""

    def resume(self) -> None:
        """A port that was full has room again."""
        ...


class Uplink(Port, Sender, Protocol):
    """The port that leads out of the switch."""

    def poll(self) -> None:
        """Look at once for frames that have come in; a member has just sent some."""
        ...

    def receivers_take(self, offloads: Offload) -> None:
        """What every port that this uplink reaches takes unfinished; other frames cost time."""
        ...
