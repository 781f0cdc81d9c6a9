"""What the switch keeps of each port: its counters, who waits for it, and its shortest way out.

A port without room may hold its senders up, or their guests would lose frames whenever a receiver
is slow.  But a receiver may be hostile and never make room, or make it one frame at a time, to stop
its neighbours.  So a port has patience to spend: it starts with `limits.MAX_BLOCKED_SECONDS`, pays
for the time that others wait, and earns a little with every frame it takes.  While it has none, its
frames are dropped, as a NIC drops what finds no receive buffer.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from typing import TYPE_CHECKING

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import NET_HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfio_user_virtio.backends.software.pcap import Capture
    from vfio_user_virtio.backends.software.ports import DirectPort, Frame, Port, Sender, Uplink
    from vfio_user_virtio.backends.software.rate_limit import TokenBucket
    from vfio_user_virtio.backends.software.vlan import PortVlans


class Drop(enum.Enum):
    """Why a frame went no further.  The first six count at the port it came from."""

    RUNT = "shorter than an Ethernet header"
    BAD_HEADER = "its virtio_net_hdr makes no sense"
    WRONG_VLAN = "its VLAN is not one of the port's"
    HAIRPIN = "its destination is where it came from"
    UNREACHABLE = "there is no port to send it to"
    RATE = "over the rate limit, and its sender cannot wait"
    NO_ROOM = "the port had no room for it"
    TOO_MANY_SEGMENTS = "flooded, and the port does not take it unsegmented"


@attrs.frozen
class PortStatistics:
    """Counters of one port since it was plugged in.

    `in` is from the port into the switch, `out` is to the port; bytes are those of Ethernet frames
    as they stood there (unsegmented ones count as one).
    """

    frames_in: int
    bytes_in: int
    frames_out: int
    bytes_out: int
    drops: Mapping[Drop, int]


class SwitchPort:
    """A port as the switch sees it; plain data, worked on by `Switch` alone.

    The `fast_…` fields are the way out of a port that has but one way: set by `Switch.refresh`.
    Sizes include the virtio_net_hdr.
    """

    __slots__ = (
        "backlog",
        "blocked_since",
        "bytes_in",
        "bytes_out",
        "capture",
        "copies",
        "deadline",
        "direct",
        "drops",
        "fast_bytes",
        "fast_deliver",
        "fast_frames",
        "fast_lacks",
        "fast_peer",
        "frames_in",
        "frames_out",
        "lacks",
        "limiter",
        "patience",
        "port",
        "resume_at",
        "sender",
        "taken_before",
        "told",
        "up",
        "uplink",
        "vlans",
        "waiting",
    )

    def __init__(
        self,
        port: Port,
        sender: Sender | None,
        uplink: Uplink | None,
        vlans: PortVlans,
        limiter: TokenBucket | None,
    ) -> None:
        self.port = port
        self.sender = sender
        self.uplink = uplink
        self.vlans = vlans
        self.limiter = limiter
        self.capture: Capture | None = None
        self.up = False
        self.lacks = 0
        self.told = -1

        self.fast_peer: SwitchPort | None = None
        self.fast_deliver: Callable[[Frame, int], bool] | None = None
        self.fast_lacks = 0
        self.fast_frames = 0
        self.fast_bytes = 0
        self.direct: DirectPort | None = None

        self.frames_in = 0
        self.bytes_in = 0
        self.frames_out = 0
        self.bytes_out = 0
        self.drops = dict.fromkeys(Drop, 0)

        self.waiting: dict[SwitchPort, None] = {}
        self.backlog: deque[tuple[Frame, int]] = deque()
        self.patience = limits.MAX_BLOCKED_SECONDS
        self.taken_before = 0
        self.blocked_since = math.inf
        self.deadline = math.inf
        self.resume_at = math.inf
        self.copies = 0

    def fold_fast_counters(self) -> None:
        """Bring the counters of the fast path home, here and at the other end."""
        frames, size = self.fast_frames, self.fast_bytes
        self.fast_frames = self.fast_bytes = 0
        self.frames_in += frames
        self.bytes_in += size
        if self.fast_peer is not None:
            self.fast_peer.frames_out += frames
            self.fast_peer.bytes_out += size

    def may_hold_up(self, now: float) -> bool:
        """Whether senders may be made to wait for this port, which has just said it has no room."""
        if self.blocked_since != math.inf:
            return now < self.deadline
        earned = (self.frames_out - self.taken_before) * limits.BLOCKED_SECONDS_PER_FRAME
        self.patience = min(limits.MAX_BLOCKED_SECONDS, self.patience + earned)
        self.taken_before = self.frames_out
        if self.patience <= 0:
            return False
        self.blocked_since = now
        self.deadline = now + self.patience
        return True

    def stop_blocking(self, now: float) -> None:
        """The port has room, or its patience is at its end."""
        if self.blocked_since != math.inf:
            waited = now - self.blocked_since
            self.patience = self.patience - waited if now < self.deadline else 0.0
            self.blocked_since = self.deadline = math.inf

    def statistics(self) -> PortStatistics:
        return PortStatistics(
            frames_in=self.frames_in,
            bytes_in=self.bytes_in - self.frames_in * NET_HEADER_SIZE,
            frames_out=self.frames_out,
            bytes_out=self.bytes_out - self.frames_out * NET_HEADER_SIZE,
            drops=dict(self.drops),
        )
