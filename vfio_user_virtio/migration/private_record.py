"""Our own record of the migration stream: what a virtio-net guest needs and device parts lack.

Device parts (virtio 1.4) have no room for the offloads that the driver has chosen, the link state,
an announcement that is owed, `config_generation` or the ISR status; a device restored from parts
alone has lost them.  They travel in one record more, after the image it belongs to and never in
front of the first, with a tag of ours that is marked optional: Linux skips it.

The payload, little-endian, without padding:

- ``0`` u16 version: 1; another version has another layout and is refused
- ``2`` u16 reserved: 0, ignored
- ``4`` fields, each of them
  - ``0`` u16 number
  - ``2`` u16 reserved: 0, ignored
  - ``4`` u32 length: bytes of the value
  - ``8`` the value

Fields are in any order, each at most once, and every one may be absent.  A field of a newer source
that we do not know is skipped, with a note; so a new field needs no new version.  A value of
another length than ours, or with bits that are not defined, refuses the record, as the same field
can never come to mean something else.

| number | name              | value                                                              |
|--------|-------------------|--------------------------------------------------------------------|
| 1      | guest_offloads    | u64, GUEST_OFFLOADS_SET's word                                     |
| 2      | mac               | 6 bytes, of the device configuration                               |
| 3      | status            | u16, of the device configuration: LINK_UP, ANNOUNCE                |
| 4      | config_generation | u8                                                                 |
| 5      | isr               | u8, ISR status: 1 a queue, 2 the configuration                     |

An announcement is pending where `status` has ANNOUNCE.  Rejected: a field of its own for it (two
truths), and a fixed layout (the next field would be a new version, which old targets refuse).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any, Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.virtio.features import feature_names
from vfio_user_virtio.virtio.net_config import NetStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vfio_user_virtio.protocol.header import Buffer

PRIVATE_TAG: Final = 0x6E75_7676
"""``vvun`` as the stream shows it, little-endian."""

VERSION: Final = 1

_HEAD: Final = struct.Struct("<HH")
_HEAD_SIZE: Final = 4
assert _HEAD.size == _HEAD_SIZE

_FIELD: Final = struct.Struct("<HHI")
_FIELD_SIZE: Final = 8
assert _FIELD.size == _FIELD_SIZE


@attrs.frozen
class PrivateState:
    """What the record carries; None is a field that it does not have.

    `guest_offloads` is a word of GUEST_… feature bits, as the driver set it last.
    """

    guest_offloads: int | None = None
    mac: bytes | None = None
    status: NetStatus | None = None
    config_generation: int | None = None
    isr: int | None = None

    @property
    def announce_pending(self) -> bool:
        """Whether the driver has been asked to announce itself and has not acknowledged."""
        return self.status is not None and NetStatus.ANNOUNCE in self.status


def encode_private(state: PrivateState) -> bytes:
    """The payload of the record; fields that are None are left out."""
    parts = [_HEAD.pack(VERSION, 0)]
    for number, field in _FIELDS.items():
        value = getattr(state, field.name)
        if value is not None:
            parts += (_FIELD.pack(number, 0, field.layout.size), field.layout.pack(value))
    return b"".join(parts)


def decode_private_untrusted(payload: Buffer) -> tuple[PrivateState, tuple[str, ...]]:
    """What the record says, and a note for the log on each field that was skipped.

    Raises ClientError: EOPNOTSUPP for another version, EINVAL for anything malformed.
    """
    view = memoryview(payload)
    if len(view) > limits.MAX_PRIVATE_RECORD:
        raise _bad(f"it has {len(view)} bytes, at most {limits.MAX_PRIVATE_RECORD} are taken")
    if len(view) < _HEAD_SIZE:
        raise _bad(f"it has {len(view)} bytes, {_HEAD_SIZE} are needed")
    version, _ = _HEAD.unpack_from(view)
    if version != VERSION:
        raise ClientError(
            errno.EOPNOTSUPP,
            f"our record of the migration stream has version {version}, this server reads "
            f"{VERSION}; migrate to a server as new as the source",
        )
    found = _fields_untrusted(view)
    values: dict[str, Any] = {
        field.name: _value_untrusted(field, found[number])
        for number, field in _FIELDS.items()
        if number in found
    }
    notes = tuple(
        f"field {number} ({len(value)} bytes) of our record of the migration stream is unknown "
        "here and was skipped; the source is newer"
        for number, value in found.items()
        if number not in _FIELDS
    )
    return PrivateState(**values), notes


def describe(state: PrivateState) -> dict[str, str]:
    """The fields that are there, by name, as a person reads them."""
    return {
        field.name: field.show(value)
        for field in _FIELDS.values()
        if (value := getattr(state, field.name)) is not None
    }


def lost_on_linux(state: PrivateState) -> tuple[str, ...]:
    """The names of what a target that skips the record (Linux) goes without."""
    return tuple(describe(state))


def _bad(what: str) -> ClientError:
    return ClientError(errno.EINVAL, f"our record of the migration stream is malformed: {what}")


def _fields_untrusted(view: memoryview) -> dict[int, memoryview]:
    """The values by field number, bounds and duplicates checked."""
    found: dict[int, memoryview] = {}
    position = _HEAD_SIZE
    while position < len(view):
        if len(view) - position < _FIELD_SIZE:
            raise _bad(f"it ends inside the head of a field, at byte {len(view)}")
        number, _, length = _FIELD.unpack_from(view, position)
        position += _FIELD_SIZE
        if length > len(view) - position:
            raise _bad(f"field {number} has {length} bytes, {len(view) - position} are left")
        if number in found:
            raise _bad(f"field {number} is there twice")
        if len(found) == limits.MAX_PRIVATE_FIELDS:
            raise _bad(f"it has more than {limits.MAX_PRIVATE_FIELDS} fields")
        found[number] = view[position : position + length]
        position += length
    return found


def _value_untrusted(field: _Field, data: memoryview) -> int | bytes:
    if len(data) != field.layout.size:
        raise _bad(f"{field.name} has {len(data)} bytes, not {field.layout.size}")
    (value,) = field.layout.unpack(data)
    if field.defined and value & ~field.defined:
        raise _bad(f"{field.name} is {value:#x}; only the bits {field.defined:#x} are defined")
    return field.build(value)


def _names(word: int, names: Iterable[str]) -> str:
    return "|".join(names) if word else "none"


def _status_names(status: int) -> str:
    return _names(status, (bit.name or "" for bit in NetStatus if bit & status))


def _isr_names(isr: int) -> str:
    return _names(isr, (name for bit, name in ((1, "queue"), (2, "configuration")) if bit & isr))


@attrs.frozen
class _Field:
    """How a field is written; `defined` are the bits it may have, 0 where any value goes."""

    name: str
    layout: struct.Struct
    show: Callable[[Any], str]
    defined: int = 0
    build: Callable[[Any], int | bytes] = int


_FIELDS: Final[Mapping[int, _Field]] = {
    1: _Field(
        "guest_offloads", struct.Struct("<Q"), lambda word: _names(word, feature_names(word))
    ),
    2: _Field("mac", struct.Struct("6s"), lambda mac: mac.hex(":"), build=bytes),
    3: _Field("status", struct.Struct("<H"), _status_names, 3, NetStatus),
    4: _Field("config_generation", struct.Struct("B"), str),
    5: _Field("isr", struct.Struct("B"), _isr_names, 3),
}
assert [field.name for field in _FIELDS.values()] == [a.name for a in attrs.fields(PrivateState)]
