"""The device side of an owner's administration virtqueue (virtio 1.4, Group administration
commands; Administration Virtqueues; Device and driver capabilities; Device resource objects; Device
parts).

`Administration` takes one encoded command at a time and gives the encoded answer, whatever the
bytes: a command that fails has a status and a qualifier, and has changed nothing.  There are two
groups, the owner itself and its members; the latter is there as soon as the owner has a member,
which is when VF Enable would be set.  Commands are rows of `_COMMANDS`.

Order of validation, as the standard demands: group, opcode (known, and in the group's USE list),
member, then the data.  `linux_compat` departs from it where Linux's driver (6.13 and newer) does,
so that this device can be put under it:

* the SR-IOV group is there before any member is
* the capability commands (7 to 9) are in the list of the SR-IOV group too, where that driver looks
  for them, and work there with member 0, as kernels before the fix of April 2025 send them
* the capability commands need no LIST_USE of the self group

Behind an `AdminQueue` of our own it is off, since our driver keeps to the text, and only a strict
device finds out if it does not.  A PF that is served has it on unless it is told otherwise, since
it is there for drivers of others.

Where the text is silent or contradicts itself:

* LIST_QUERY and LIST_USE take any member id
* MODIFY is 0xb and QUERY 0xc, as in their own sections
* any object id is taken; GET and SET objects share one space of ids, over all members, and are
  counted apart
* a result that does not fit is cut, only that of DEV_PARTS_METADATA_GET is ENOMEM instead
* an object survives the reset of its member; what was set survives its object

Legacy commands (2 to 6) are carried out by the member (`member.legacy`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.parts_objects import PartsObjects, Refused
from vfio_user_virtio.virtio.admin import (
    CAPABILITY_OPCODES,
    DEV_PARTS_OPCODES,
    LEGACY_OPCODES,
    STATUS_SIZE,
    Answer,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_bits_untrusted,
    decode_command_untrusted,
    encode_answer,
    encode_bits,
)
from vfio_user_virtio.virtio.admin_commands import (
    DEV_PARTS_CAPABILITY,
    MODE_STOPPED,
    decode_capability_untrusted,
    decode_object_limits_untrusted,
    decode_u8_untrusted,
    encode_object_limits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfio_user_virtio.backends.software.owner import Owner
    from vfio_user_virtio.virtio.admin import Command

MAX_OBJECTS: Final = 255
"""Of each kind: the capability has a byte for each."""

_LISTS: Final = frozenset((Opcode.LIST_QUERY, Opcode.LIST_USE))


class Administration:
    """Administration of `owner`, which allows so many GET and SET objects."""

    def __init__(
        self,
        owner: Owner,
        *,
        get_objects: int = MAX_OBJECTS,
        set_objects: int = MAX_OBJECTS,
        linux_compat: bool = False,
    ) -> None:
        if not (0 <= get_objects <= MAX_OBJECTS and 0 <= set_objects <= MAX_OBJECTS):
            raise ValueError(f"{get_objects} and {set_objects} objects: {MAX_OBJECTS} at most")
        self._owner = owner
        self._compat = linux_compat
        self._limits = (get_objects, set_objects)
        self.objects = PartsObjects(owner)
        self._lists: dict[int, frozenset[int]] = {}
        self.reset()

    def reset(self) -> None:
        """The owner is reset: no objects, no capabilities set, no lists but LIST_QUERY and _USE.

        Members are left as they are, stopped or not.
        """
        self.objects.clear()
        self._lists = {int(group): frozenset(map(int, _LISTS)) for group in GroupType}

    @property
    def member_ids(self) -> frozenset[int]:
        """Whom commands of the SR-IOV group can be for."""
        return frozenset(self._owner.members)

    async def execute(self, readable: bytes, writable: int) -> bytes:
        """Carry out the command in `readable`; what is written of `writable` bytes, status first.

        Waits only for a member to stop.  Commands for the same member have to come one by one.
        """
        command = decode_command_untrusted(readable)
        room = writable - STATUS_SIZE
        try:
            self._check_untrusted(command)
            if command.opcode == Opcode.DEV_MODE_SET:
                await self._mode_set(command)
                result = b""
            else:
                result = _COMMANDS[command.opcode](self, command, room)
        except Refused as refusal:
            answer = Answer(refusal.status, refusal.qualifier)
        else:
            answer = Answer(Status.OK, Qualifier.OK, result)
        return encode_answer(answer, max(0, writable))

    # --- validation ----------------------------------------------------------------------------

    def _check_untrusted(self, command: Command) -> None:
        group, opcode, member = command.group_type, command.opcode, command.member_id
        if group not in self._lists or (
            group == GroupType.SR_IOV and not self._owner.members and not self._compat
        ):
            raise Refused(Status.EINVAL, Qualifier.INVALID_GROUP)
        unlisted = self._compat and group == GroupType.SELF and opcode in CAPABILITY_OPCODES
        if opcode not in self._lists[group] and not unlisted:
            raise Refused(Status.EINVAL, Qualifier.INVALID_OPCODE)
        if opcode in _LISTS:
            return
        if group == GroupType.SELF or opcode in CAPABILITY_OPCODES:
            known = member == 0
        else:
            known = member in self._owner.members
        if not known:
            raise Refused(Status.EINVAL, Qualifier.INVALID_MEMBER)

    def _reported(self, group: int) -> frozenset[int]:
        if group == GroupType.SELF:
            return frozenset(map(int, _LISTS | CAPABILITY_OPCODES))
        known = _LISTS | LEGACY_OPCODES | DEV_PARTS_OPCODES
        return frozenset(map(int, known | CAPABILITY_OPCODES if self._compat else known))

    # --- commands ------------------------------------------------------------------------------

    def _list_query(self, command: Command, room: int) -> bytes:
        return encode_bits(self._reported(command.group_type))

    def _list_use(self, command: Command, room: int) -> bytes:
        wanted = decode_bits_untrusted(command.data)
        if not wanted <= self._reported(command.group_type):
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        self._lists[command.group_type] = wanted
        return b""

    def _cap_id_list_query(self, command: Command, room: int) -> bytes:
        return encode_bits((DEV_PARTS_CAPABILITY,))

    def _device_cap_get(self, command: Command, room: int) -> bytes:
        _capability_value(command)
        return encode_object_limits(*self._limits)

    def _driver_cap_set(self, command: Command, room: int) -> bytes:
        wanted = decode_object_limits_untrusted(_capability_value(command))
        if any(limit > most for limit, most in zip(wanted, self._limits, strict=True)):
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        self.objects.limit(*wanted)
        return b""

    async def _mode_set(self, command: Command) -> None:
        flags = decode_u8_untrusted(command.data)
        if flags & ~MODE_STOPPED:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)
        mode = self._owner.members[command.member_id].mode
        if not flags:
            mode.resume()
        elif not await mode.stop():
            raise Refused(Status.EAGAIN, Qualifier.TRYAGAIN)

    def _of_object(self, command: Command, room: int) -> bytes:
        return self.objects.execute(command, room)

    def _of_member(self, command: Command, room: int) -> bytes:
        return self._owner.members[command.member_id].legacy.execute_untrusted(command, room)


def _capability_value(command: Command) -> bytes:
    """The bytes that follow the id of the only capability there is."""
    capability, value = decode_capability_untrusted(command.data)
    if capability != DEV_PARTS_CAPABILITY:
        raise Refused(Status.ENXIO, Qualifier.INVALID_FIELD)
    return value


_COMMANDS: Final[Mapping[int, Callable[[Administration, Command, int], bytes]]] = {
    Opcode.LIST_QUERY: Administration._list_query,
    Opcode.LIST_USE: Administration._list_use,
    Opcode.CAP_ID_LIST_QUERY: Administration._cap_id_list_query,
    Opcode.DEVICE_CAP_GET: Administration._device_cap_get,
    Opcode.DRIVER_CAP_SET: Administration._driver_cap_set,
    **dict.fromkeys(DEV_PARTS_OPCODES - {Opcode.DEV_MODE_SET}, Administration._of_object),
    **dict.fromkeys(LEGACY_OPCODES, Administration._of_member),
}
"""What is done for each command with so much room for its result; DEV_MODE_SET may have to wait."""
