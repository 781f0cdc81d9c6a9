"""The sending side of one queue pair: frames out of the driver's buffers into the switch.

A frame's first bytes (`ports.HEAD_SIZE`) are copied once, and decisions and transport use that
copy; the rest goes as views of guest memory straight to whoever takes it.  A destination that is
full leaves the chain in the ring, where the driver sees it as not yet sent: that is the only queue
between the guest and the wire.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import (
    HEAD_SIZE,
    MIN_FRAME_SIZE,
    NET_HEADER_SIZE,
    Buffer,
)
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.virtio.split_queue import SplitQueue

MAX_SIZE: Final = limits.MAX_FRAME_SIZE + NET_HEADER_SIZE

F_NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80


class Outcome(enum.Enum):
    """How a pass over the ring ended."""

    DRAINED = enum.auto()
    """The ring is empty and kicks are on."""
    MORE = enum.auto()
    """The budget is used up; call again."""
    BLOCKED = enum.auto()
    """The destination or the rate limit wants a pause; call again when told."""


class Headers:
    """Which virtio_net_hdr a driver may send that negotiated `features`."""

    __slots__ = ("_checksum", "_gso_types")

    def __init__(self, features: int) -> None:
        self._checksum = bool(features & Feature.CSUM.mask)
        types = {GSO_NONE}
        for feature, gso_type in (
            (Feature.HOST_TSO4, GSO_TCPV4),
            (Feature.HOST_TSO6, GSO_TCPV6),
            (Feature.HOST_USO, GSO_UDP_L4),
        ):
            if features & feature.mask:
                types.add(gso_type)
                if features & Feature.HOST_ECN.mask and gso_type != GSO_UDP_L4:
                    types.add(gso_type | GSO_ECN)
        self._gso_types = frozenset(types)

    def allowed_untrusted(self, head: bytes) -> bytes | None:
        """`head` with the header cleaned of what is not the driver's to say; None: drop it.

        Only NEEDS_CSUM is a driver's flag.  A type of segmentation that was not negotiated, or one
        without a checksum to complete, makes the frame unsendable.
        """
        flags, gso_type = head[0], head[1]
        if gso_type not in self._gso_types:
            return None
        if flags & F_NEEDS_CSUM and not self._checksum:
            return None
        if gso_type != GSO_NONE and not flags & F_NEEDS_CSUM:
            return None
        if flags & ~F_NEEDS_CSUM:
            return bytes((flags & F_NEEDS_CSUM,)) + head[1:]
        return head


class Transmitter:
    """Sending from `queue`; `send(frame, size)` is the switch's answer to each frame."""

    __slots__ = ("_headers", "_queue", "_send", "invalid")

    def __init__(
        self,
        queue: SplitQueue,
        headers: Headers,
        send: Callable[[Sequence[Buffer], int], bool],
    ) -> None:
        self._queue = queue
        self._headers = headers
        self._send = send
        self.invalid = 0
        """Frames dropped because they were too short, too long, or had a bad header."""

    def run(self, budget: int) -> Outcome:
        """Send up to `budget` frames, fewer if they are in many pieces.

        Raises DriverError when the ring is broken.
        """
        queue, send = self._queue, self._send
        queue.disable_kicks()
        while budget > 0:
            chain = queue.take()
            if chain is None:
                if queue.enable_kicks():
                    return Outcome.DRAINED
                continue
            budget -= 1
            readable = chain.readable
            frame: Sequence[Buffer] | None
            if len(readable) == 1 and len(readable[0]) >= HEAD_SIZE:
                whole = readable[0]
                size = len(whole)
                head = bytes(whole[:HEAD_SIZE])
                frame = (head, whole[HEAD_SIZE:])
            else:
                frame, size = gather_head(readable)
                budget -= len(readable) // limits.PIECES_OF_WORK
            if frame is not None and frame[0][0] | frame[0][1]:
                frame = self._checked(frame)
            if frame is None or size > MAX_SIZE:
                self.invalid += 1
            elif not send(frame, size):
                queue.give_back()
                return Outcome.BLOCKED
            queue.put(chain.head, 0)
            queue.publish()
        return Outcome.MORE

    def _checked(self, frame: Sequence[Buffer]) -> Sequence[Buffer] | None:
        head = self._headers.allowed_untrusted(bytes(frame[0]))
        return None if head is None else (head, *frame[1:])


def gather_head(views: Sequence[memoryview]) -> tuple[Sequence[Buffer] | None, int]:
    """The frame in `views` with its head copied out, and its size; None if it is too short."""
    size = sum(map(len, views))
    if size < MIN_FRAME_SIZE:
        return None, size
    head = b""
    rest: list[Buffer] = []
    for view in views:
        missing = HEAD_SIZE - len(head)
        if missing:
            head += view[:missing]
            view = view[missing:]
        if view:
            rest.append(view)
    return (head, *rest), size
