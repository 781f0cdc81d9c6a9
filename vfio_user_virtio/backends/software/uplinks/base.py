"""What all uplinks have in common: one descriptor, read when it has something and ports have room.

An uplink is synchronous where frames are concerned, so that a member's pass can call straight into
it, and has one task (`run`) that waits for the descriptor.  The task sleeps in `wait_readable`, or,
while a port has no room for the next frame, until the switch says `resume`: an idle uplink and a
stuck one both cost nothing.  A failure is logged once and takes the port down; members live on.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import HEAD_SIZE, NET_HEADER_SIZE, Offload

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Buffer, Frame
    from vfio_user_virtio.backends.software.switch import Switch

_log = logging.getLogger(__name__)

MAX_PARTS: Final = 1_024
"""Pieces that one writev takes (UIO_MAXIOV)."""

LARGEST: Final = NET_HEADER_SIZE + limits.MAX_FRAME_SIZE


class BaseUplink:
    """An uplink on a descriptor that one `run` at a time serves; a subclass moves the frames.

    It is plugged in by its creator (`Switch.plug_uplink`) before `run` starts.
    """

    def __init__(self, switch: Switch, name: str) -> None:
        self._switch = switch
        self._name = name
        self._fd = -1
        self._starved = False
        """No port has room for the next frame: do not read until `resume`."""
        self._wake = trio.Event()
        self._choked = trio.Event()
        self._scope = trio.CancelScope()
        self._failure: str | None = None
        self.discarded = 0
        """Frames that the host did not want, or that were not frames."""

    # --- Port, Sender, Uplink -----------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def offloads(self) -> Offload:
        return Offload(0)

    @property
    def up(self) -> bool:
        return self._fd >= 0

    def deliver(self, frame: Frame, size: int) -> bool:
        raise NotImplementedError

    def flush(self) -> None:
        """Frames are handed down one by one; there is nothing to be done at the end of a batch."""

    def receivers_take(self, offloads: Offload) -> None:
        """What we read is finished anyway, unless a subclass says otherwise."""

    def resume(self) -> None:
        self._starved = False
        self._wake.set()
        self.drain()

    def poll(self) -> None:
        if not self._starved:
            self.drain()

    def drain(self) -> None:
        """Move frames from the descriptor into the switch until either has enough."""
        raise NotImplementedError

    # --- the task -----------------------------------------------------------------------------

    async def serve(self, fd: int) -> str | None:
        """Be up on `fd`, which is non-blocking and stays the caller's, until it fails.

        Returns what went wrong.  `deliver` is not called any more when it returns or raises.
        """
        self._fd = fd
        self._starved = False
        self._failure = None
        self._choked = trio.Event()
        self._switch.refresh()
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_when_possible, fd)
                    await self._read_when_possible(fd)
        finally:
            self._fd = -1
            self._switch.refresh()
        return self._failure

    async def _read_when_possible(self, fd: int) -> None:
        while True:
            if self._starved:
                self._wake = trio.Event()
                await self._wake.wait()
            else:
                await trio.lowlevel.wait_readable(fd)
                self.poll()

    async def _write_when_possible(self, fd: int) -> None:
        while True:
            await self._choked.wait()
            await self._until_writable(fd)
            self._choked = trio.Event()
            if self._write_pending():
                self._switch.writable(self)
            else:
                self._choked.set()

    async def _until_writable(self, fd: int) -> None:
        await trio.lowlevel.wait_writable(fd)

    def _write_pending(self) -> bool:
        """Write what was accepted but not written; False if there is still some."""
        return True

    # --- for subclasses -----------------------------------------------------------------------

    def _choke(self) -> bool:
        """The descriptor takes no more just now: `deliver` answers with this."""
        self._choked.set()
        return False

    def _fail(self, reason: str) -> None:
        """The descriptor is of no more use."""
        if self._failure is None:
            self._failure = reason
            self._fd = -1
            self._scope.cancel()


def in_one_piece(frame: Frame) -> list[Buffer]:
    """The frame without its virtio_net_hdr, as what one writev takes."""
    parts: list[Buffer] = [memoryview(frame[0])[NET_HEADER_SIZE:], *frame[1:]]
    return parts if len(parts) < MAX_PARTS else [b"".join(parts)]


class PacketUplink(BaseUplink):
    """An uplink that reads one frame at a time, into memory of its own first.

    With more than one member it cannot know whose a frame is before it is read, so it must not be
    read into any guest's memory.  `with_header`: frames come with a virtio_net_hdr.
    """

    def __init__(self, switch: Switch, name: str, *, with_header: bool) -> None:
        super().__init__(switch, name)
        buffer = bytearray(LARGEST + 1)
        self._view = memoryview(buffer)
        self._read_at = 0 if with_header else NET_HEADER_SIZE
        self._read_into = (self._view[self._read_at :],)
        self._kept: tuple[Frame, int] | None = None

    def drain(self) -> None:
        if self._fd >= 0:
            try:
                self._drain()
            except OSError as error:
                self._read_failed(error)
            self._switch.flush()

    def _drain(self) -> None:
        self._drain_by_copy()

    def _read_failed(self, error: OSError) -> None:
        self._fail(f"reading failed: {error.strerror}")

    def _drain_by_copy(self) -> None:
        """Read frames into the buffer and send them on.  Raises OSError if reading fails."""
        forward, view, fd = self._switch.forward, self._view, self._fd
        if not self._send_kept():
            return
        for _ in range(limits.WORK_BUDGET):
            try:
                size = os.readv(fd, self._read_into) + self._read_at
            except BlockingIOError:
                return
            if size > LARGEST:
                self.discarded += 1
                continue
            frame = (bytes(view[: min(size, HEAD_SIZE)]), view[HEAD_SIZE:size])
            if not forward(self, frame, size):
                self._keep(frame, size)
                return

    def _keep(self, frame: Frame, size: int) -> None:
        """No port has room for this frame, and the buffer that it is in is not used until then."""
        self._kept = (frame, size)
        self._starved = True

    def _send_kept(self) -> bool:
        """Send the frame that had to wait; False if it still has to."""
        if self._kept is not None:
            if not self._switch.forward(self, *self._kept):
                self._starved = True
                return False
            self._kept = None
        return True
