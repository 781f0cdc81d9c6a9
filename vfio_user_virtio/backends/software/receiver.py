"""The receiving side of one queue pair: frames into the buffers that the driver has posted.

Buffers are taken from the ring ahead of need and kept, so that a frame costs only the buffers that
it fills: an uplink reads straight into the kept views (`reserve`, `commit`), and what it did not
fill waits for the next frame.  Nothing in guest memory shows that a buffer was taken, so `forget`
can give all of them back at any time, which it must when mappings change or the queue stops.

With MRG_RXBUF a frame spreads over as many buffers as it needs; without, each frame needs one
buffer that is large enough, and one that is too long is dropped, as the standard says.

When the driver has posted less than the largest frame needs, an uplink reads into what there is
and, behind it, into a spill area of the process.  A frame that reached the spill area is held
until there is room, so that a small ring loses nothing.  Where the driver's buffers are in more
pieces than one readv takes, the spill area is all the room there is.  What is held outlives the
receiver (`take_held`, `keep`), so that a queue can be closed and opened again between two frames.

A driver can post buffers in a thousand pieces each, a millisecond of work, and frames come by the
hundred.  So after `limits.MAX_RECEIVED_PIECES` there is no room until others have had their turn
(`Effort`).  An honest driver's frames have that many pieces, too, after a while, and the turn then
costs nothing that matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import NET_HEADER_SIZE, first_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.backends.software.ports import Buffer
    from vfio_user_virtio.virtio.split_queue import SplitQueue

MAX_PARTS: Final = 1_023
"""Pieces that one readv takes (UIO_MAXIOV), less the spill area."""

LARGEST: Final = limits.MAX_FRAME_SIZE + NET_HEADER_SIZE
_NUM_BUFFERS: Final = 10
_SPILL: Final = memoryview(bytearray(LARGEST + 1))


class Effort:
    """What all receivers of a member together may still do before others get their turn.

    `rest` is called when that is nothing; then, or whenever others have had a turn, `rested` is
    to be called.
    """

    __slots__ = ("pieces_left", "rest")

    def __init__(self, rest: Callable[[], None] = lambda: None) -> None:
        self.rest = rest
        self.rested()

    def rested(self) -> None:
        self.pieces_left = limits.MAX_RECEIVED_PIECES


class Receiver:
    """Delivery into `queue`."""

    __slots__ = (
        "_capacity",
        "_chains",
        "_effort",
        "_held",
        "_kicks",
        "_mergeable",
        "_queue",
        "_room",
        "_views",
        "too_long",
    )

    def __init__(self, queue: SplitQueue, *, mergeable: bool, effort: Effort | None = None) -> None:
        self._queue = queue
        self._mergeable = mergeable
        self._effort = Effort() if effort is None else effort
        self._chains: list[tuple[int, int, int]] = []
        """Taken from the ring, oldest first: head, how many views, how many bytes."""
        self._views: list[memoryview] = []
        self._room: Sequence[memoryview] = ()
        """What `reserve` gave last."""
        self._capacity = 0
        self._held: list[bytes] = []
        self._kicks = True
        """Whether the driver tells us when it posts buffers."""
        self.too_long = 0
        """Frames dropped because no buffer of the driver could hold them."""

    def reserve(self) -> Sequence[memoryview] | None:
        """Room for the largest frame, the driver's buffers first; None if it has posted none."""
        if self._held and not self.release_held():
            return None
        views = self._views
        if self._mergeable:
            while self._capacity <= LARGEST and len(views) < MAX_PARTS and self._take():
                pass
        while not views and not self._take():
            if self._starved():
                return None
        if len(views) >= MAX_PARTS:
            self._room = (_SPILL,)
        elif self._capacity > LARGEST:
            self._room = views
        else:
            self._room = [*views, _SPILL]
        return self._room

    def commit(self, size: int) -> None:
        """The reserved room holds a frame of `size` bytes: give it to the driver, or hold it."""
        if size <= self._capacity and self._room[0] is not _SPILL:
            self._finish(size)
            return
        frame = self._reserved(size)
        if not self._deliver((frame,), size):
            self._held.append(frame)

    def deliver(self, frame: Sequence[Buffer], size: int) -> bool:
        """Copy a frame of `size` bytes in; False if there is no room now."""
        if self._held and not self.release_held():
            return False
        return self._deliver(frame, size)

    def _deliver(self, frame: Sequence[Buffer], size: int) -> bool:
        while self._capacity < size and (self._mergeable or not self._chains):
            if not self._take() and self._starved():
                if len(self._chains) < self._queue.size:
                    return False
                self.too_long += 1
                return True
        if self._capacity < size:
            self.too_long += 1
            return True
        views = self._views
        first = views[0]
        if len(first) >= size:
            position = 0
            for part in frame:
                end = position + len(part)
                first[position:end] = part
                position = end
        else:
            _scatter(frame, views)
        self._finish(size)
        return True

    def should_interrupt(self) -> bool:
        """Whether the driver wants to be told of what it was given."""
        return self._queue.should_interrupt()

    def peek(self, size: int) -> bytes:
        """The first `size` bytes of the reserved room, or as many as it has."""
        first = self._room[0]
        return bytes(first[:size]) if len(first) >= size else self._reserved(size)

    def reserved(self, size: int) -> Sequence[Buffer]:
        """The first `size` bytes of the reserved room, as a frame for another queue's `deliver`."""
        return (self._reserved(size),)

    def _reserved(self, size: int) -> bytes:
        return first_bytes(self._room, size)

    def keep(self, frames: list[bytes]) -> None:
        """Deliver `frames`, which another receiver of this queue could not, before any other."""
        self._held[:0] = frames

    def take_held(self) -> list[bytes]:
        """The frames that are held, oldest first; they are the caller's now."""
        held, self._held = self._held, []
        return held

    def release_held(self) -> bool:
        """Deliver what is held, as far as there is room; whether all of it is gone."""
        while self._held:
            frame = self._held[0]
            if not self._deliver((frame,), len(frame)):
                return False
            del self._held[0]
        return True

    def forget(self) -> None:
        """Give back every buffer that was taken and not filled, and drop the views."""
        if self._chains:
            self._queue.give_back(len(self._chains))
            self._chains.clear()
            self._views.clear()
            self._room = ()
            self._capacity = 0

    def _take(self) -> bool:
        effort = self._effort
        if effort.pieces_left <= 0:
            return False
        chain = self._queue.take()
        if chain is None:
            return False
        writable = chain.writable
        effort.pieces_left -= len(writable)
        size = len(writable[0]) if len(writable) == 1 else sum(map(len, writable))
        if self._kicks:
            self._kicks = False
            self._queue.disable_kicks()
        self._chains.append((chain.head, len(writable), size))
        self._views.extend(writable)
        self._capacity += size
        return True

    def _starved(self) -> bool:
        """Ask to be told when the driver posts more; False if it just has."""
        if self._effort.pieces_left <= 0:
            self._effort.rest()
            return True
        self._kicks = True
        return self._queue.enable_kicks()

    def _finish(self, size: int) -> None:
        queue, chains, views = self._queue, self._chains, self._views
        head, num_views, capacity = chains[0]
        if size <= capacity:
            _set_num_buffers(views, 1)
            queue.put(head, size)
            del chains[0]
            del views[:num_views]
            self._capacity -= capacity
        else:
            self._finish_merged(size)
        queue.publish()

    def _finish_merged(self, size: int) -> None:
        used = used_views = 0
        room = 0
        for head, num_views, capacity in self._chains:
            self._queue.put(head, min(capacity, size - room))
            room += capacity
            used += 1
            used_views += num_views
            if room >= size:
                break
        _set_num_buffers(self._views, used)
        del self._chains[:used]
        del self._views[:used_views]
        self._capacity -= room


def _set_num_buffers(views: list[memoryview], count: int) -> None:
    first = views[0]
    if len(first) >= NET_HEADER_SIZE:
        first[_NUM_BUFFERS] = count & 0xFF
        first[_NUM_BUFFERS + 1] = count >> 8
        return
    position = 0
    for view in views:
        for offset, value in ((_NUM_BUFFERS, count & 0xFF), (_NUM_BUFFERS + 1, count >> 8)):
            if position <= offset < position + len(view):
                view[offset - position] = value
        position += len(view)
        if position >= NET_HEADER_SIZE:
            return


def _scatter(frame: Sequence[Buffer], views: Sequence[memoryview]) -> None:
    """Copy the bytes of `frame` into `views`, which have room for them."""
    targets = iter(views)
    target = next(targets)
    position = 0
    for part in frame:
        rest = memoryview(part)
        while rest:
            room = len(target) - position
            if not room:
                target, position = next(targets), 0
                continue
            piece = rest[:room]
            target[position : position + len(piece)] = piece
            position += len(piece)
            rest = rest[len(piece) :]
