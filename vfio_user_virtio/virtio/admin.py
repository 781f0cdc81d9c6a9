"""Administration commands: how one is framed, and how its answer reads (virtio 1.4, Group
administration commands; Administration Virtqueues).

A command is two buffers.  What the device reads: opcode u16, group_type u16, 12 reserved bytes,
group_member_id u64, then the command's data.  What it writes: status u16, status_qualifier u16, 4
reserved bytes, then the command's result.  All little-endian, without padding between fields.

Lengths are tolerated, as the standard demands of both sides: what is too short reads as zeros,
what is too long is ignored, and the device fills its part up to a multiple of 8.  `encode_command`
pads to 8 too, except for the legacy writes, whose length is the width of the access.  Linux pads
nothing, so a device that insisted on multiples would refuse it.

The data of each command is `virtio.admin_commands`; what is inside DEV_PARTS_GET and _SET is
`virtio.parts`.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

_COMMAND: Final = struct.Struct("<HH12xQ")
COMMAND_HEADER_SIZE: Final = 24
assert _COMMAND.size == COMMAND_HEADER_SIZE
_STATUS: Final = struct.Struct("<HH4x")
STATUS_SIZE: Final = 8
assert _STATUS.size == STATUS_SIZE
ALIGNMENT: Final = 8


class Opcode(enum.IntEnum):
    """Commands.  The numbers of MODIFY and QUERY are those of their own sections; the standard's
    table has them the other way round, and drivers are better off sending neither."""

    LIST_QUERY = 0x00
    LIST_USE = 0x01
    LEGACY_COMMON_CFG_WRITE = 0x02
    LEGACY_COMMON_CFG_READ = 0x03
    LEGACY_DEV_CFG_WRITE = 0x04
    LEGACY_DEV_CFG_READ = 0x05
    LEGACY_NOTIFY_INFO = 0x06
    CAP_ID_LIST_QUERY = 0x07
    DEVICE_CAP_GET = 0x08
    DRIVER_CAP_SET = 0x09
    RESOURCE_OBJ_CREATE = 0x0A
    RESOURCE_OBJ_MODIFY = 0x0B
    RESOURCE_OBJ_QUERY = 0x0C
    RESOURCE_OBJ_DESTROY = 0x0D
    DEV_PARTS_METADATA_GET = 0x0E
    DEV_PARTS_GET = 0x0F
    DEV_PARTS_SET = 0x10
    DEV_MODE_SET = 0x11


class GroupType(enum.IntEnum):
    """Groups of members: the owner itself (member 0), and its VFs (1 … NumVFs)."""

    SELF = 0
    SR_IOV = 1


class Status(enum.IntEnum):
    """status: the numbers are Linux's errno values.  EEXIST is used by the standard's text on
    resource objects but missing from its table."""

    OK = 0
    ENXIO = 6
    EAGAIN = 11
    ENOMEM = 12
    EBUSY = 16
    EEXIST = 17
    EINVAL = 22
    ENOSPC = 28


class Qualifier(enum.IntEnum):
    """status_qualifier: what was wrong."""

    OK = 0
    INVALID_COMMAND = 1
    INVALID_OPCODE = 2
    INVALID_FIELD = 3
    INVALID_GROUP = 4
    INVALID_MEMBER = 5
    NORESOURCE = 6
    TRYAGAIN = 7


DEV_PARTS_OPCODES: Final = frozenset(
    opcode for opcode in Opcode if opcode >= Opcode.RESOURCE_OBJ_CREATE
)
"""What migration needs of the SR-IOV group."""

CAPABILITY_OPCODES: Final = frozenset(
    (Opcode.CAP_ID_LIST_QUERY, Opcode.DEVICE_CAP_GET, Opcode.DRIVER_CAP_SET)
)
"""What migration needs of the self group."""

LEGACY_OPCODES: Final = frozenset(
    opcode
    for opcode in Opcode
    if Opcode.LEGACY_COMMON_CFG_WRITE <= opcode <= Opcode.LEGACY_NOTIFY_INFO
)

_WIDTH_IS_LENGTH: Final = frozenset((Opcode.LEGACY_COMMON_CFG_WRITE, Opcode.LEGACY_DEV_CFG_WRITE))


@attrs.frozen
class Command:
    """One command: `data` is what follows the header, of a decoded command with its padding."""

    opcode: int
    group_type: int
    member_id: int
    data: bytes = b""


@attrs.frozen
class Answer:
    """One answer: `result` is what follows the status, of a decoded answer with its padding."""

    status: int
    qualifier: int = Qualifier.OK
    result: bytes = b""

    @property
    def ok(self) -> bool:
        return self.status == Status.OK

    @property
    def errno(self) -> int:
        """The status as an errno; one that the standard does not know counts as EINVAL."""
        return self.status if self.status in _STATUSES else Status.EINVAL

    def describe(self) -> str:
        """The status and its qualifier by name."""
        return f"{_name(Status, self.status)} ({_name(Qualifier, self.qualifier)})"


_STATUSES: Final = frozenset(int(status) for status in Status)


def encode_command(command: Command) -> bytes:
    """What the device reads."""
    head = _COMMAND.pack(command.opcode, command.group_type, command.member_id)
    padding = 0 if command.opcode in _WIDTH_IS_LENGTH else -len(command.data) % ALIGNMENT
    return b"".join((head, command.data, bytes(padding)))


def decode_command_untrusted(readable: bytes) -> Command:
    """A command of a driver, of any length; what is missing is 0."""
    opcode, group_type, member_id = _COMMAND.unpack(fitted(readable, COMMAND_HEADER_SIZE))
    return Command(opcode, group_type, member_id, readable[COMMAND_HEADER_SIZE:])


def encode_answer(answer: Answer, writable: int) -> bytes:
    """What the device writes into `writable` bytes: cut to fit, else a multiple of 8."""
    raw = _STATUS.pack(answer.status, answer.qualifier) + answer.result
    return padded(raw)[:writable]


def decode_answer_untrusted(written: bytes) -> Answer | None:
    """The answer in the `written` bytes of a device, or None if not even a status is there.

    The result may have padding behind it, and may be cut.
    """
    if len(written) < STATUS_SIZE:
        return None
    status, qualifier = _STATUS.unpack_from(written)
    return Answer(status, qualifier, written[STATUS_SIZE:])


def padded(data: bytes) -> bytes:
    """`data` and zeros up to a multiple of 8 bytes."""
    return data + bytes(-len(data) % ALIGNMENT)


def fitted(data: bytes, size: int) -> bytes:
    """The first `size` bytes of `data`, as if zeros followed it."""
    return data[:size].ljust(size, b"\0")


def opcode_name(opcode: int) -> str:
    """The name of a command, for messages."""
    return _name(Opcode, opcode)


def _name(kind: type[enum.IntEnum], value: int) -> str:
    try:
        return kind(value).name
    except ValueError:
        return f"{value:#x}"


# --- bitmaps of opcodes and capabilities --------------------------------------------------------

_BITMAP_SIZE: Final = (1 << 16) // 8
"""Bytes of a bitmap that can mean anything: opcodes and capabilities are u16."""


def encode_bits(numbers: Iterable[int]) -> bytes:
    """A bitmap as an array of u64, one word at least; number n is bit n % 64 of word n / 64.

    That is ceil((n + 1) / 64) words; the standard's shorthand forgets the + 1.
    """
    word = 0
    for number in numbers:
        word |= 1 << number
    return word.to_bytes(max(1, (word.bit_length() + 63) // 64) * 8, "little")


def decode_bits_untrusted(data: bytes) -> frozenset[int]:
    """The numbers below 65,536 that are set in a bitmap of any length."""
    return frozenset(
        8 * index + bit
        for index, byte in enumerate(data[:_BITMAP_SIZE])
        if byte
        for bit in range(8)
        if byte >> bit & 1
    )
