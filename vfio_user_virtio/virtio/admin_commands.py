"""The data and results of administration commands (virtio 1.4, Group administration commands;
Device and driver capabilities; Device resource objects; Device parts; Legacy Interfaces).

A driver's side builds a `Command` per function; a device's side takes the data apart again.  All
little-endian.  No decoder here refuses anything: what is missing reads as 0, what is too much is
ignored, and whether the values make sense is for the device to say, with the qualifier that the
standard wants.  `virtio.admin` frames the commands.

Objects are made for the SR-IOV group: the only type here is DEV_PARTS, whose objects belong to a
member.  Object ids are the driver's choice, for both kinds from one space.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.virtio.admin import Command, GroupType, Opcode, encode_bits, fitted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CAPABILITY: Final = struct.Struct("<H6x")
CAPABILITY_HEADER_SIZE: Final = 8
_LIMITS: Final = struct.Struct("<BB")
_OBJECT: Final = struct.Struct("<H2xI")
OBJECT_HEADER_SIZE: Final = 8
_OBJECT_SPEC: Final = struct.Struct("<H2xIQB7x")
_PARTS_REQUEST: Final = struct.Struct("<H2xIB7x")
PARTS_REQUEST_SIZE: Final = 16
_KIND: Final = struct.Struct("<B7x")
_COUNT: Final = struct.Struct("<I4x")
COUNT_SIZE: Final = 8
_NOTIFY_INFO: Final = struct.Struct("<BB6xQ")
NOTIFY_INFO_SIZE: Final = 64
assert (_CAPABILITY.size, _OBJECT.size, _COUNT.size) == (8, 8, 8)
assert (_PARTS_REQUEST.size, _OBJECT_SPEC.size) == (PARTS_REQUEST_SIZE, 24)
assert 4 * _NOTIFY_INFO.size == NOTIFY_INFO_SIZE


class ObjectKind(enum.IntEnum):
    """What a DEV_PARTS resource object is for."""

    GET = 0
    SET = 1


class MetadataKind(enum.IntEnum):
    """What DEV_PARTS_METADATA_GET asks for."""

    SIZE = 0
    COUNT = 1
    LIST = 2


class GetKind(enum.IntEnum):
    """Which parts DEV_PARTS_GET asks for."""

    SELECTED = 0
    ALL = 1


DEV_PARTS_CAPABILITY: Final = 0x0000
DEV_PARTS_OBJECT: Final = 0x000
MODE_STOPPED: Final = 0x01


# --- command lists ------------------------------------------------------------------------------


def list_query(group: GroupType) -> Command:
    """Which opcodes does the device know for `group`?  Result: a bitmap."""
    return Command(Opcode.LIST_QUERY, group, 0)


def list_use(group: GroupType, opcodes: Iterable[int]) -> Command:
    """These opcodes, and no others, will be used with `group`.  Data: a bitmap."""
    return Command(Opcode.LIST_USE, group, 0, encode_bits(opcodes))


# --- capabilities -------------------------------------------------------------------------------


def cap_id_list_query() -> Command:
    """Which capabilities has the owner?  Result: a bitmap."""
    return Command(Opcode.CAP_ID_LIST_QUERY, GroupType.SELF, 0)


def device_cap_get(capability: int) -> Command:
    """What does the device say of `capability`?  Data: id u16, 6 reserved.  Result: its value."""
    return Command(Opcode.DEVICE_CAP_GET, GroupType.SELF, 0, _CAPABILITY.pack(capability))


def driver_cap_set(capability: int, value: bytes) -> Command:
    """How much of `capability` the driver will use.  Data: id u16, 6 reserved, its value."""
    data = _CAPABILITY.pack(capability) + value
    return Command(Opcode.DRIVER_CAP_SET, GroupType.SELF, 0, data)


def decode_capability_untrusted(data: bytes) -> tuple[int, bytes]:
    """The id in the data of DEVICE_CAP_GET or DRIVER_CAP_SET, and the value after it."""
    (capability,) = _CAPABILITY.unpack(fitted(data, CAPABILITY_HEADER_SIZE))
    return capability, data[CAPABILITY_HEADER_SIZE:]


def encode_object_limits(get: int, set_: int) -> bytes:
    """The value of DEV_PARTS_CAPABILITY: how many objects of each kind, each a u8."""
    return _LIMITS.pack(get, set_)


def decode_object_limits_untrusted(value: bytes) -> tuple[int, int]:
    """The limits of GET and of SET objects."""
    get, set_ = _LIMITS.unpack(fitted(value, _LIMITS.size))
    return get, set_


# --- resource objects ---------------------------------------------------------------------------


@attrs.frozen
class ObjectSpec:
    """The data of RESOURCE_OBJ_CREATE and _MODIFY: type u16, 2 reserved, id u32, flags u64, and
    of a DEV_PARTS object kind u8, 7 reserved.

    _QUERY has them up to `flags`, and _DESTROY up to `object_id`.
    """

    type: int
    object_id: int
    flags: int
    kind: int


def object_create(member: int, object_id: int, kind: ObjectKind) -> Command:
    """Make a DEV_PARTS object of `member`."""
    return _object_spec(Opcode.RESOURCE_OBJ_CREATE, member, object_id, kind)


def object_modify(member: int, object_id: int, kind: ObjectKind) -> Command:
    """Change a DEV_PARTS object."""
    return _object_spec(Opcode.RESOURCE_OBJ_MODIFY, member, object_id, kind)


def object_query(member: int, object_id: int) -> Command:
    """What was said of a DEV_PARTS object?  Result: kind u8, 7 reserved."""
    return _of_object(Opcode.RESOURCE_OBJ_QUERY, member, object_id, bytes(8))


def object_destroy(member: int, object_id: int) -> Command:
    """Forget a DEV_PARTS object."""
    return _of_object(Opcode.RESOURCE_OBJ_DESTROY, member, object_id, b"")


def decode_object_spec_untrusted(data: bytes) -> ObjectSpec:
    """The data of a command that is about an object."""
    return ObjectSpec(*_OBJECT_SPEC.unpack(fitted(data, _OBJECT_SPEC.size)))


def encode_object_kind(kind: int) -> bytes:
    """The result of RESOURCE_OBJ_QUERY."""
    return _KIND.pack(kind)


# --- device parts -------------------------------------------------------------------------------


@attrs.frozen
class PartsRequest:
    """The data of DEV_PARTS_METADATA_GET and DEV_PARTS_GET: type u16, 2 reserved, id u32, kind u8
    (a `MetadataKind` or a `GetKind`), 7 reserved, and of a `GetKind.SELECTED` part headers."""

    type: int
    object_id: int
    kind: int
    headers: bytes


def metadata_get(member: int, object_id: int, kind: MetadataKind) -> Command:
    """Result: size or count u32 and 4 reserved; for LIST, that many part headers follow."""
    return _of_object(Opcode.DEV_PARTS_METADATA_GET, member, object_id, _KIND.pack(kind))


def parts_get(member: int, object_id: int, selected: bytes | None = None) -> Command:
    """All parts, or those whose headers are `selected`.  Result: parts, end to end."""
    kind = GetKind.ALL if selected is None else GetKind.SELECTED
    data = _KIND.pack(kind) + (selected or b"")
    return _of_object(Opcode.DEV_PARTS_GET, member, object_id, data)


def parts_set(member: int, object_id: int, parts: bytes | memoryview) -> Command:
    """Set `parts`, end to end, of a member that is stopped."""
    return _of_object(Opcode.DEV_PARTS_SET, member, object_id, parts)


def mode_set(member: int, *, stopped: bool) -> Command:
    """Stop the member, or let it run again.  Data: flags u8, of which 1 is `MODE_STOPPED`."""
    data = _KIND.pack(MODE_STOPPED if stopped else 0)
    return Command(Opcode.DEV_MODE_SET, GroupType.SR_IOV, member, data)


def decode_parts_request_untrusted(data: bytes) -> PartsRequest:
    """The data of DEV_PARTS_METADATA_GET or DEV_PARTS_GET."""
    type_, object_id, kind = _PARTS_REQUEST.unpack(fitted(data, PARTS_REQUEST_SIZE))
    return PartsRequest(type_, object_id, kind, data[PARTS_REQUEST_SIZE:])


def decode_parts_set_untrusted(data: bytes) -> tuple[int, int, bytes]:
    """The object's type and id, and the parts, in the data of DEV_PARTS_SET."""
    type_, object_id = _OBJECT.unpack(fitted(data, OBJECT_HEADER_SIZE))
    return type_, object_id, data[OBJECT_HEADER_SIZE:]


def decode_u8_untrusted(data: bytes) -> int:
    """The flags in the data of DEV_MODE_SET, or the kind in the result of RESOURCE_OBJ_QUERY."""
    return fitted(data, 1)[0]


def encode_count(count: int) -> bytes:
    """The result of DEV_PARTS_METADATA_GET: a size in bytes, or a number of parts."""
    return _COUNT.pack(count)


def decode_count_untrusted(result: bytes) -> int:
    """The size or count in the result of DEV_PARTS_METADATA_GET."""
    (count,) = _COUNT.unpack(fitted(result, COUNT_SIZE))
    return int(count)


# --- the legacy interface -----------------------------------------------------------------------


class NotifyPlace(enum.IntEnum):
    """Whose BAR takes a legacy driver's notifications; 0 ends the list."""

    OWNER = 1
    MEMBER = 2


@attrs.frozen
class NotifyInfo:
    """One entry of the result of LEGACY_NOTIFY_INFO: flags u8 (`place`), bar u8 (1 to 5), 6
    reserved, offset u64 in bytes, a multiple of 2."""

    place: NotifyPlace
    bar: int
    offset: int


MAX_NOTIFY_INFO: Final = 3
"""The result has four entries, and the last must end the list."""


def legacy_write(opcode: Opcode, member: int, offset: int, data: bytes) -> Command:
    """A write of the legacy interface: offset u8, 7 reserved, the bytes."""
    return Command(opcode, GroupType.SR_IOV, member, _KIND.pack(offset) + data)


def legacy_read(opcode: Opcode, member: int, offset: int) -> Command:
    """A read of the legacy interface: offset u8; as wide as the answer's room."""
    return Command(opcode, GroupType.SR_IOV, member, _KIND.pack(offset))


def legacy_notify_info(member: int) -> Command:
    """Where may the legacy driver's notifications be written?"""
    return Command(Opcode.LEGACY_NOTIFY_INFO, GroupType.SR_IOV, member)


def decode_legacy_untrusted(data: bytes) -> tuple[int, bytes]:
    """The offset and, of a write, the bytes."""
    return decode_u8_untrusted(data), data[_KIND.size :]


def encode_notify_info(entries: Sequence[NotifyInfo]) -> bytes:
    """The result of LEGACY_NOTIFY_INFO, best place first.  Raises ValueError for a fourth."""
    if len(entries) > MAX_NOTIFY_INFO:
        raise ValueError(f"{len(entries)} places to notify; there is room for {MAX_NOTIFY_INFO}")
    raw = b"".join(_NOTIFY_INFO.pack(entry.place, entry.bar, entry.offset) for entry in entries)
    return raw.ljust(NOTIFY_INFO_SIZE, b"\0")


def decode_notify_info_untrusted(result: bytes) -> list[NotifyInfo]:
    """The usable entries up to the end of the list; malformed ones are skipped."""
    entries: list[NotifyInfo] = []
    for flags, bar, offset in _NOTIFY_INFO.iter_unpack(fitted(result, NOTIFY_INFO_SIZE)):
        if flags == 0:
            break
        if flags in _PLACES and 1 <= bar <= 5 and offset % 2 == 0:
            entries.append(NotifyInfo(NotifyPlace(flags), bar, offset))
    return entries


_PLACES: Final = frozenset(int(place) for place in NotifyPlace)


def _object_spec(opcode: Opcode, member: int, object_id: int, kind: ObjectKind) -> Command:
    data = _OBJECT_SPEC.pack(DEV_PARTS_OBJECT, object_id, 0, kind)
    return Command(opcode, GroupType.SR_IOV, member, data)


def _of_object(opcode: Opcode, member: int, object_id: int, data: bytes | memoryview) -> Command:
    header = _OBJECT.pack(DEV_PARTS_OBJECT, object_id)
    return Command(opcode, GroupType.SR_IOV, member, header + data)
