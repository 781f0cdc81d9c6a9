"""The 16-byte header of every vfio-user message, and whole messages made from it.

Source: vfio-user, Header.  Little-endian:

- ``0`` u16 message_id: the sender's own, echoed in the reply; need not be unique
- ``2`` u16 command: `Command`, echoed in the reply
- ``4`` u32 size: of the whole message, this header included
- ``8`` u32 flags: bits 0-3 `MessageType`, bit 4 NO_REPLY, bit 5 ERROR; the rest is reserved
- ``12`` u32 error: an errno, meaningful only with ERROR, and 0 is possible even then

Reserved flag bits are ignored, as QEMU does: they say nothing about where the next message is.
A size or a type that cannot be true is another matter: then nothing says where it is.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Protocol, TypeAlias

import attrs

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_MESSAGE_SIZE

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Payload in one piece; a memoryview must be one of contiguous bytes."""

HEADER: Final = struct.Struct("<HHIII")
HEADER_SIZE: Final = 16
assert HEADER.size == HEADER_SIZE

TYPE_MASK: Final = 0xF
REPLY: Final = 1
NO_REPLY: Final = 1 << 4
ERROR: Final = 1 << 5


class Command(enum.IntEnum):
    """Commands (vfio-user, Commands); DMA_READ and DMA_WRITE go from server to client.

    14 was DIRTY_PAGES and is retired.  19 is in no release of the specification: a fork of QEMU
    uses it (see `precopy_info`).
    """

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18
    MIG_GET_PRECOPY_INFO = 19


COMMANDS_WITH_FDS: Final = frozenset({Command.DMA_MAP, Command.DEVICE_SET_IRQS})
"""Commands that may bring fds; fds with any other are closed and the command answered EINVAL."""

REPLIES_WITH_FDS: Final = frozenset(
    {Command.VERSION, Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS}
)
"""Commands whose reply may bring fds (VERSION: the twin socket)."""


@attrs.frozen
class Header:
    """A header as it stands on the wire; `command` may be a number no `Command` has."""

    message_id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0


class Identified(Protocol):
    """What a reply echoes of the request it answers: a `Header` or a `framing.Frame`."""

    @property
    def message_id(self) -> int: ...

    @property
    def command(self) -> int: ...


def encode_header(header: Header) -> bytes:
    return HEADER.pack(header.message_id, header.command, header.size, header.flags, header.error)


def decode_header_untrusted(
    data: Buffer, offset: int = 0, max_message_size: int = MAX_MESSAGE_SIZE
) -> Header:
    """The header at `offset` of `data`.  Raises ConnectionLost; 16 bytes must be there."""
    view = memoryview(data)[offset : offset + HEADER_SIZE]
    if len(view) < HEADER_SIZE:
        raise ConnectionLost(f"{len(view)} bytes are not a vfio-user header of {HEADER_SIZE}")
    header = Header(*HEADER.unpack(view))
    if not header_is_sound(header.size, header.flags, max_message_size):
        raise framing_lost(header.size, header.flags, max_message_size)
    return header


def header_is_sound(size: int, flags: int, max_message_size: int) -> bool:
    """Whether a header tells where the next one is."""
    return HEADER_SIZE <= size <= max_message_size and flags & TYPE_MASK <= REPLY


def framing_lost(size: int, flags: int, max_message_size: int) -> ConnectionLost:
    """Why a header is not sound.  There is no safe answer: the sender is out of step."""
    if flags & TYPE_MASK > REPLY:
        return ConnectionLost(
            f"message type {flags & TYPE_MASK} is neither command (0) nor reply (1)"
        )
    return ConnectionLost(
        f"message size {size} is outside {HEADER_SIZE}…{max_message_size}; "
        "the peer must keep to the max_data_xfer_size that was negotiated"
    )


def encode_command(
    message_id: int,
    command: int,
    payload: Buffer = b"",
    *,
    tail_size: int = 0,
    no_reply: bool = False,
) -> bytes:
    """A whole command, or one to which `tail_size` bytes are to be added.

    With `no_reply` its receiver must stay silent, even if it fails.
    """
    size = HEADER_SIZE + memoryview(payload).nbytes + tail_size
    head = HEADER.pack(message_id, command, size, NO_REPLY if no_reply else 0, 0)
    return b"".join((head, payload))


def encode_reply(request: Identified, payload: Buffer = b"", *, tail_size: int = 0) -> bytes:
    """A whole successful reply to `request`, or one to which `tail_size` bytes are to be added."""
    size = HEADER_SIZE + memoryview(payload).nbytes + tail_size
    return b"".join((HEADER.pack(request.message_id, request.command, size, REPLY, 0), payload))


def encode_error_reply(request: Identified, errno: int) -> bytes:
    """A whole error reply to `request`: a header and nothing else."""
    return HEADER.pack(request.message_id, request.command, HEADER_SIZE, REPLY | ERROR, errno)
