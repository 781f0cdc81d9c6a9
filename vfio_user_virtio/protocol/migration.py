"""Migration: its three device features, VFIO_USER_MIG_DATA_READ and VFIO_USER_MIG_DATA_WRITE.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE and the sections of those names.  Features' data,
little-endian:

- MIGRATION, GET: u64 `MigrationFlags`
- MIG_DEVICE_STATE, GET and SET: u32 `MigrationState`, u32 data_fd, which vfio-user does not use
  (generic code takes anything but 0xffffffff for an fd, so that is what we send)
- MIG_DATA_SIZE, GET: u64 stop_copy_length, bytes that are still to come

MIG_DATA_READ, both ways, and MIG_DATA_WRITE, whose reply is empty:

- ``0`` u32 argsz: at least 8 + size; in the read reply, exactly that
- ``4`` u32 size: bytes; in the read reply, those that are there, fewer meaning no more just now
- ``8`` data: `size` bytes in a read reply and in a write request
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.checks import (
    distrust,
    refuse,
    require_argsz,
    require_exact_reply,
    require_reply,
    require_request,
)

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

FEATURE_U64: Final = struct.Struct("<Q")
"""The data of MIGRATION and of MIG_DATA_SIZE."""

DEVICE_STATE: Final = struct.Struct("<II")
DEVICE_STATE_SIZE: Final = 8

MIG_DATA: Final = struct.Struct("<II")
MIG_DATA_SIZE: Final = 8

assert (FEATURE_U64.size, DEVICE_STATE.size, MIG_DATA.size) == (8, 8, 8)

NO_DATA_FD: Final = 0xFFFFFFFF


class MigrationFlags(enum.IntFlag):
    """What a device can do (feature MIGRATION); STOP_COPY is required."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class MigrationState(enum.IntEnum):
    """Migration states by number; the specification has no …_P2P ones, generic VFIO clients do."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


_REQUESTABLE: Final = frozenset(MigrationState) - {MigrationState.ERROR}


def encode_migration_flags(flags: MigrationFlags) -> bytes:
    return FEATURE_U64.pack(flags)


def decode_migration_flags_untrusted(data: Buffer) -> MigrationFlags:
    """From a GET reply.  Raises ConnectionLost."""
    require_exact_reply(data, FEATURE_U64.size, "GET MIGRATION")
    return MigrationFlags(FEATURE_U64.unpack(data)[0])


def encode_data_size(stop_copy_length: int) -> bytes:
    return FEATURE_U64.pack(stop_copy_length)


def decode_data_size_untrusted(data: Buffer) -> int:
    """From a GET reply: bytes still to come.  Raises ConnectionLost."""
    require_exact_reply(data, FEATURE_U64.size, "GET MIG_DATA_SIZE")
    return int(FEATURE_U64.unpack(data)[0])


def encode_device_state(state: MigrationState) -> bytes:
    """The data of a SET request or a GET reply."""
    return DEVICE_STATE.pack(state, NO_DATA_FD)


def decode_device_state_request_untrusted(data: Buffer) -> MigrationState:
    """The state a SET asks for; whether the device has it is its to say.

    Raises ClientError(EINVAL) for what is no state, and for ERROR.
    """
    if len(data) != DEVICE_STATE_SIZE:
        raise refuse(f"SET MIG_DEVICE_STATE brings {len(data)} bytes, not {DEVICE_STATE_SIZE}")
    state = DEVICE_STATE.unpack(data)[0]
    if state not in _REQUESTABLE:
        wanted = ", ".join(f"{one.name} ({one})" for one in sorted(_REQUESTABLE))
        raise refuse(f"SET MIG_DEVICE_STATE asks for state {state}, not one of {wanted}")
    return MigrationState(state)


def decode_device_state_reply_untrusted(data: Buffer) -> MigrationState:
    """From a GET reply, ERROR included.  Raises ConnectionLost."""
    require_exact_reply(data, DEVICE_STATE_SIZE, "GET MIG_DEVICE_STATE")
    state = DEVICE_STATE.unpack(data)[0]
    try:
        return MigrationState(state)
    except ValueError:
        raise distrust(f"GET MIG_DEVICE_STATE says {state}, which is no state") from None


def encode_migration_data_head(size: int) -> bytes:
    """What stands before `size` bytes of data, in a read reply and in a write request."""
    return MIG_DATA.pack(MIG_DATA_SIZE + size, size)


def encode_migration_read_request(size: int) -> bytes:
    return encode_migration_data_head(size)


def decode_migration_read_request_untrusted(
    payload: Buffer, max_size: int = MAX_DATA_XFER_SIZE
) -> int:
    """How many bytes are asked for.  Raises ClientError(EINVAL).

    A payload longer than 8 bytes is let pass: one client sends its whole reply buffer.
    """
    return _decode_head(payload, max_size, "MIG_DATA_READ")


def decode_migration_read_reply_untrusted(payload: Buffer, size: int) -> bytes | memoryview:
    """The data, at most the `size` bytes asked for.  Raises ConnectionLost.

    libvfio-user pads its reply to what was asked for; the size field counts.
    """
    require_reply(payload, MIG_DATA_SIZE, "MIG_DATA_READ")
    found = MIG_DATA.unpack_from(payload)[1]
    if found > size or MIG_DATA_SIZE + found > len(payload):
        raise distrust(
            f"the reply to MIG_DATA_READ of {size} bytes counts {found} "
            f"and has {len(payload) - MIG_DATA_SIZE}"
        )
    return memoryview(payload)[MIG_DATA_SIZE : MIG_DATA_SIZE + found]


def decode_migration_write_request_untrusted(
    payload: Buffer, max_size: int = MAX_DATA_XFER_SIZE
) -> int:
    """How many bytes of data there are, at ``payload[MIG_DATA_SIZE:]``.

    Raises ClientError(EINVAL).
    """
    size = _decode_head(payload, max_size, "MIG_DATA_WRITE")
    if len(payload) != MIG_DATA_SIZE + size:
        raise refuse(f"MIG_DATA_WRITE of {size} bytes brings {len(payload) - MIG_DATA_SIZE}")
    return size


def _decode_head(payload: Buffer, max_size: int, name: str) -> int:
    require_request(payload, MIG_DATA_SIZE, name)
    argsz, size = MIG_DATA.unpack_from(payload)
    if size > max_size:
        raise refuse(f"{name} of {size} bytes; max_data_xfer_size is {max_size}")
    require_argsz(argsz, MIG_DATA_SIZE + size, name)
    return int(size)
