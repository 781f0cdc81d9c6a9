"""The DEV_PARTS resource objects of an owner, and the commands that need one (virtio 1.4, Device
resource objects; Device parts).

An object says no more than that its driver may get, or set, the parts of one member: nothing is
kept in it.  So it may be destroyed at any time, and what has been set waits at the member.

Which status a failure has, where the standard leaves it open:

* an object that is not there, or is another member's: ENXIO; an id that is taken, by whatever
  member: EEXIST; no more objects of a kind: ENOSPC
* a GET command with a SET object or the other way round, another type than DEV_PARTS, undefined
  flags or kinds, and parts that are malformed or do not fit: EINVAL, INVALID_FIELD
* DEV_PARTS_SET while the member is running: EINVAL, INVALID_COMMAND
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.virtio.admin import Opcode, Qualifier, Status
from vfio_user_virtio.virtio.admin_commands import (
    DEV_PARTS_OBJECT,
    GetKind,
    MetadataKind,
    ObjectKind,
    decode_object_spec_untrusted,
    decode_parts_request_untrusted,
    decode_parts_set_untrusted,
    encode_count,
    encode_object_kind,
)
from vfio_user_virtio.virtio.parts import (
    PartsError,
    decode_headers_untrusted,
    encode_part_list,
    encode_parts,
    parse_parts_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfio_user_virtio.backends.software.owner import Owner
    from vfio_user_virtio.virtio.admin import Command
    from vfio_user_virtio.virtio.admin_commands import ObjectSpec
    from vfio_user_virtio.virtio.part_header import PartHeader


class Refused(Exception):
    """A command fails with `status` and `qualifier`, and has changed nothing."""

    def __init__(self, status: Status, qualifier: Qualifier) -> None:
        super().__init__(f"{status.name}, {qualifier.name}")
        self.status = status
        self.qualifier = qualifier


@attrs.frozen
class PartsObject:
    """An object: whose parts it is for, and what for."""

    member_id: int
    kind: ObjectKind


class PartsObjects:
    """The objects of all members of `owner`, by id."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._limits = dict.fromkeys(ObjectKind, 0)
        self._objects: dict[int, PartsObject] = {}

    def __len__(self) -> int:
        return len(self._objects)

    def clear(self) -> None:
        """Forget all objects, and how many there may be."""
        self._limits = dict.fromkeys(ObjectKind, 0)
        self._objects.clear()

    def limit(self, get: int, set_: int) -> None:
        """Allow so many objects of each kind.  Raises Refused (EBUSY) if there are more already."""
        limits = {ObjectKind.GET: get, ObjectKind.SET: set_}
        if any(self._count(kind) > limit for kind, limit in limits.items()):
            raise Refused(Status.EBUSY, Qualifier.INVALID_COMMAND)
        self._limits = limits

    def execute(self, command: Command, room: int) -> bytes:
        """The result of a command on an object or on a member's parts, for which `room` bytes are
        there.  Raises Refused."""
        return _COMMANDS[command.opcode](self, command, room)

    # --- objects -------------------------------------------------------------------------------

    def _create(self, command: Command, room: int) -> bytes:
        spec = decode_object_spec_untrusted(command.data)
        kind = _kind_untrusted(spec)
        if spec.object_id in self._objects:
            raise Refused(Status.EEXIST, Qualifier.INVALID_FIELD)
        self._require_free(kind)
        self._objects[spec.object_id] = PartsObject(command.member_id, kind)
        return b""

    def _modify(self, command: Command, room: int) -> bytes:
        spec = decode_object_spec_untrusted(command.data)
        kind = _kind_untrusted(spec)
        if self._object(command, spec.object_id).kind is not kind:
            self._require_free(kind)
            self._objects[spec.object_id] = PartsObject(command.member_id, kind)
        return b""

    def _query(self, command: Command, room: int) -> bytes:
        spec = decode_object_spec_untrusted(command.data)
        _require_parts_object(spec.type)
        if spec.flags:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        return encode_object_kind(self._object(command, spec.object_id).kind)

    def _destroy(self, command: Command, room: int) -> bytes:
        spec = decode_object_spec_untrusted(command.data)
        _require_parts_object(spec.type)
        self._object(command, spec.object_id)
        del self._objects[spec.object_id]
        return b""

    def _object(self, command: Command, object_id: int) -> PartsObject:
        found = self._objects.get(object_id)
        if found is None or found.member_id != command.member_id:
            raise Refused(Status.ENXIO, Qualifier.INVALID_FIELD)
        return found

    def _require(self, command: Command, type_: int, object_id: int, kind: ObjectKind) -> None:
        _require_parts_object(type_)
        if self._object(command, object_id).kind is not kind:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)

    def _require_free(self, kind: ObjectKind) -> None:
        if self._count(kind) >= self._limits[kind]:
            raise Refused(Status.ENOSPC, Qualifier.INVALID_COMMAND)

    def _count(self, kind: ObjectKind) -> int:
        return sum(found.kind is kind for found in self._objects.values())

    # --- parts ---------------------------------------------------------------------------------

    def _metadata_get(self, command: Command, room: int) -> bytes:
        request = decode_parts_request_untrusted(command.data)
        self._require(command, request.type, request.object_id, ObjectKind.GET)
        mode = self._owner.members[command.member_id].mode
        match request.kind:
            case MetadataKind.SIZE:
                result = encode_count(mode.size())
            case MetadataKind.COUNT:
                result = encode_count(len(mode.parts()))
            case MetadataKind.LIST:
                result = encode_part_list(part.header for part in mode.parts())
            case _:
                raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        if len(result) > room:
            raise Refused(Status.ENOMEM, Qualifier.INVALID_COMMAND)
        return result

    def _parts_get(self, command: Command, room: int) -> bytes:
        request = decode_parts_request_untrusted(command.data)
        self._require(command, request.type, request.object_id, ObjectKind.GET)
        parts = self._owner.members[command.member_id].mode.parts()
        if request.kind == GetKind.SELECTED:
            wanted = {header.key for header in _headers_untrusted(request.headers)}
            parts = [part for part in parts if part.header.key in wanted]
        elif request.kind != GetKind.ALL:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        return encode_parts(parts)

    def _parts_set(self, command: Command, room: int) -> bytes:
        type_, object_id, image = decode_parts_set_untrusted(command.data)
        self._require(command, type_, object_id, ObjectKind.SET)
        mode = self._owner.members[command.member_id].mode
        if not mode.stopped:
            raise Refused(Status.EINVAL, Qualifier.INVALID_COMMAND)
        try:
            mode.set_parts_untrusted(parse_parts_untrusted(image))
        except PartsError as error:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD) from error
        return b""


def _headers_untrusted(data: bytes) -> list[PartHeader]:
    try:
        return decode_headers_untrusted(data)
    except PartsError as error:
        raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD) from error


def _kind_untrusted(spec: ObjectSpec) -> ObjectKind:
    """What the object is for.  Raises Refused for what is no DEV_PARTS object."""
    _require_parts_object(spec.type)
    if spec.flags or spec.kind not in _KINDS:
        raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
    return ObjectKind(spec.kind)


def _require_parts_object(type_: int) -> None:
    if type_ != DEV_PARTS_OBJECT:
        raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)


_KINDS: Final = frozenset(map(int, ObjectKind))

_COMMANDS: Final[Mapping[int, Callable[[PartsObjects, Command, int], bytes]]] = {
    Opcode.RESOURCE_OBJ_CREATE: PartsObjects._create,
    Opcode.RESOURCE_OBJ_MODIFY: PartsObjects._modify,
    Opcode.RESOURCE_OBJ_QUERY: PartsObjects._query,
    Opcode.RESOURCE_OBJ_DESTROY: PartsObjects._destroy,
    Opcode.DEV_PARTS_METADATA_GET: PartsObjects._metadata_get,
    Opcode.DEV_PARTS_GET: PartsObjects._parts_get,
    Opcode.DEV_PARTS_SET: PartsObjects._parts_set,
}
