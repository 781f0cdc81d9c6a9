"""Cuts a byte stream with fds into messages.

A UNIX stream socket keeps neither the borders of messages nor, quite, those of fds.  What Linux
keeps is this: data that carried fds ends a read, and a sender attaches fds to a message's first
byte.  So the fds of one read belong to the last message that *starts* in it, or, if none does, to
the message in progress.  Not to the first that could take one: with a pipelined DMA_UNMAP, two
DMA_MAPs and one fd in a read, that would leave a piece of RAM unmapped.

This is the loop every register access runs through, so `Frame` is flat and mutable and the header
is unpacked where it lies; an object per header cost as much again as all the rest (measured).  A
payload is copied once: cut out of the read that holds it, or joined from the pieces it came in.

Rejected: a preallocated buffer of the announced size (an announcement is not data), and one
bytearray for the stream (a second copy of every payload).
"""

from __future__ import annotations

from typing import Final

import attrs

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_ANCILLARY_FDS, MAX_MESSAGE_SIZE
from vfio_user_virtio.protocol.header import (
    ERROR,
    HEADER,
    HEADER_SIZE,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    framing_lost,
    header_is_sound,
)

_COALESCE: Final = 4096
"""Neighbouring pieces of a payload are kept apart only if they are larger than this together, so
that a payload that comes a byte at a time costs about its own size."""


@attrs.define(eq=False)
class Frame:
    """One message: the fields of its header (`header.Header`), its payload, its fds."""

    message_id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]

    @property
    def is_reply(self) -> bool:
        return self.flags & TYPE_MASK == REPLY

    @property
    def no_reply(self) -> bool:
        """The sender of this command wants silence, be it success or failure."""
        return self.flags & NO_REPLY != 0

    @property
    def is_error(self) -> bool:
        """This reply says that the command failed, with `error` (which may be 0 even so)."""
        return self.flags & ERROR != 0

    def take_fds(self) -> list[int]:
        """All fds of this message; from here on the caller closes them."""
        taken, self.fds = self.fds, []
        return taken

    @property
    def unclaimed(self) -> list[int]:
        """The fds that nobody took: whoever is done with the frame closes these."""
        return self.fds


class FrameReader:
    """Turns what a socket brings into `Frame`s.

    Once the framing is lost the reader is `broken`: frames that were complete before are still
    returned, later calls of `receive` raise.
    """

    def __init__(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        self.max_message_size = max_message_size
        self.broken: ConnectionLost | None = None
        self._head = b""  # of the message in progress, while shorter than a header
        self._frame: Frame | None = None  # the message in progress, once its header is known
        self._pieces: list[bytes] = []  # of its payload
        self._missing = 0  # bytes of its payload
        self._fds: list[int] = []  # of the message in progress

    @property
    def partial(self) -> bool:
        """A message has begun and is not complete (nor ever will be, if broken)."""
        return bool(self._head) or self._frame is not None or self.broken is not None

    @property
    def missing(self) -> int:
        """How many bytes of the message in progress are still to come, once its header has."""
        return self._missing

    def take_fds(self) -> list[int]:
        """The fds that are in no frame yet; the caller closes them when the stream ends."""
        taken, self._fds = self._fds, []
        return taken

    def receive(self, data: bytes, fds: list[int]) -> list[Frame]:
        """The messages that `data`, one read of the socket, completes.

        `fds` are those the same read brought; they leave again in a frame or by `take_fds`.
        Raises ConnectionLost if the framing is lost and no frame came before that; with frames,
        look at `broken` when they are dealt with.
        """
        if self.broken is not None:
            self._fds += fds
            raise self.broken
        frames: list[Frame] = []
        position = self._advance(data, 0, frames) if self.partial else 0
        end = len(data)
        limit = self.max_message_size
        unpack_from = HEADER.unpack_from
        while end - position >= HEADER_SIZE:
            message_id, command, size, flags, error = unpack_from(data, position)
            stop = position + size
            if stop > end or size < HEADER_SIZE or size > limit or flags & TYPE_MASK > REPLY:
                break
            body = data[position + HEADER_SIZE : stop]
            frames.append(Frame(message_id, command, flags, error, body, []))
            position = stop
        if position < end:
            self._advance(data, position, frames)
        if fds:
            self._give(fds, frames)
        if not frames:
            self._fail_if_broken()
        return frames

    def _fail_if_broken(self) -> None:
        if self.broken is not None:
            raise self.broken

    def _advance(self, data: bytes, position: int, frames: list[Frame]) -> int:
        """Carry on with, or begin, a message that is in pieces; where in `data` that ends."""
        if self._frame is None:
            start, position = position, position + HEADER_SIZE - len(self._head)
            self._head += data[start:position]
            if len(self._head) < HEADER_SIZE:
                return len(data)
            message_id, command, size, flags, error = HEADER.unpack(self._head)
            self._head = b""
            if not header_is_sound(size, flags, self.max_message_size):
                self.broken = framing_lost(size, flags, self.max_message_size)
                return len(data)
            self._frame = Frame(message_id, command, flags, error, b"", [])
            self._missing = size - HEADER_SIZE
        piece = data[position : position + self._missing]
        if self._pieces and len(self._pieces[-1]) + len(piece) <= _COALESCE:
            self._pieces[-1] += piece
        else:
            self._pieces.append(piece)
        self._missing -= len(piece)
        if self._missing == 0:
            self._frame.payload = b"".join(self._pieces)
            self._frame.fds = self.take_fds()
            frames.append(self._frame)
            self._frame, self._pieces = None, []
        return position + len(piece)

    def _give(self, fds: list[int], frames: list[Frame]) -> None:
        """Give the fds of one read to the message they belong to (see the module head)."""
        if frames and not self.partial:
            frames[-1].fds += fds
            return
        self._fds += fds
        if len(self._fds) > MAX_ANCILLARY_FDS:
            self.broken = ConnectionLost(
                f"one message brought {len(self._fds)} file descriptors; "
                f"no more than {MAX_ANCILLARY_FDS} can be sent with one"
            )
