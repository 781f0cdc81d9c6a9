"""Any administration commands, in any order: what was accepted is so, what was refused changed
nothing, and every answer is well formed.

That is, for each command of the owner (opcodes 0x00 to 0x11) and for any other bytes:

* `Administration` raises nothing; its answer is as long as the room allows and at most that, a
  multiple of 8 where it is not cut, with a status and a qualifier of the standard, both OK or
  neither, and with nothing behind them if it is a refusal
* what is refused leaves the owner's lists, limits and objects and all of its members as they were,
  and so does what only asks
* what was CREATEd or MODIFYed is what QUERY says, what was DESTROYed is gone; what was SET is what
  GET gives, and that image can be SET and changes nothing; a command that sets something does no
  more when it comes again
* a command that was accepted, taken apart and put together anew without what is reserved or too
  long, gets the same answer from another owner and does the same to it

Run it with ``python -m tests.fuzz.fuzz_admin -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: a byte (bit 0: member 1 is running, bit 1: `linux_compat`), then commands, each with its
length and with the room for its answer before it, u16 each; room 0xffff stands for enough.
"""

from __future__ import annotations

import copy
import importlib
import struct
import sys
from typing import TYPE_CHECKING, Final

from tests.backends.administration_rig import ROOM, Driver, a_config
from tests.virtio.rings import finish
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    ALIGNMENT,
    LEGACY_OPCODES,
    STATUS_SIZE,
    Command,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_answer_untrusted,
    decode_bits_untrusted,
    decode_command_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.admin_commands import GetKind, ObjectKind
from vfio_user_virtio.virtio.net_parts import decode_mac_table_untrusted, decode_vlans_untrusted
from vfio_user_virtio.virtio.part_header import ControlCommand, PartType
from vfio_user_virtio.virtio.parts import encode_parts, parse_parts_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfio_user_virtio.virtio.admin import Answer
    from vfio_user_virtio.virtio.parts import Part

GET_OBJECT: Final = 5
SET_OBJECT: Final = 6
OTHERS_OBJECT: Final = 7
LIMITS: Final = (3, 3)
ASKING: Final = frozenset(
    (
        Opcode.LIST_QUERY,
        Opcode.CAP_ID_LIST_QUERY,
        Opcode.DEVICE_CAP_GET,
        Opcode.RESOURCE_OBJ_QUERY,
        Opcode.DEV_PARTS_METADATA_GET,
        Opcode.DEV_PARTS_GET,
    )
)
OF_OBJECTS: Final = frozenset(
    (Opcode.RESOURCE_OBJ_CREATE, Opcode.RESOURCE_OBJ_MODIFY, Opcode.RESOURCE_OBJ_DESTROY)
)

_LENGTHS: Final = struct.Struct("<HH")


def an_owner(flags: int) -> Driver:
    """Two members; member 1 has a GET and a SET object, and member 2 a GET object."""
    driver = Driver(
        a_config(1, queue_pairs=2),
        a_config(2),
        get_objects=LIMITS[0],
        set_objects=LIMITS[1],
        linux_compat=bool(flags & 2),
    )
    driver.set_up(*LIMITS)
    driver.result(commands.object_create(1, GET_OBJECT, ObjectKind.GET))
    driver.result(commands.object_create(1, SET_OBJECT, ObjectKind.SET))
    driver.result(commands.object_create(2, OTHERS_OBJECT, ObjectKind.GET))
    if not flags & 1:
        assert finish(driver.member().mode.stop())
    return driver


def everything(driver: Driver) -> object:
    """All that a command could change."""
    device = driver.device
    return copy.deepcopy(
        (
            device._lists,
            device.objects._limits,
            device.objects._objects,
            [
                (
                    member.mode.stopped,
                    encode_parts(member.mode.parts()),
                    member.mode.private_state(),
                    member.function.common.state,
                    member.state,
                )
                for member in driver.owner.members.values()
            ],
        )
    )


# --- a command put together anew ----------------------------------------------------------------


def _with_object(command: Command) -> Command:
    spec = commands.decode_object_spec_untrusted(command.data)
    data = struct.pack("<H2xIQB7x", spec.type, spec.object_id, spec.flags, spec.kind)
    return Command(command.opcode, command.group_type, command.member_id, data)


def _with_request(command: Command) -> Command:
    request = commands.decode_parts_request_untrusted(command.data)
    data = struct.pack("<H2xIB7x", request.type, request.object_id, request.kind)
    if command.opcode == Opcode.DEV_PARTS_GET and request.kind == GetKind.SELECTED:
        data += request.headers
    return Command(command.opcode, command.group_type, command.member_id, data)


def _with_parts(command: Command) -> Command:
    type_, object_id, image = commands.decode_parts_set_untrusted(command.data)
    data = struct.pack("<H2xI", type_, object_id) + image
    return Command(command.opcode, command.group_type, command.member_id, data)


def _with_capability(command: Command) -> Command:
    capability, value = commands.decode_capability_untrusted(command.data)
    data = struct.pack("<H6x", capability)
    if command.opcode == Opcode.DRIVER_CAP_SET:
        data += commands.encode_object_limits(*commands.decode_object_limits_untrusted(value))
    return Command(command.opcode, command.group_type, command.member_id, data)


def _with_bits(command: Command) -> Command:
    known = decode_bits_untrusted(command.data)
    rebuilt = commands.list_use(GroupType.SELF, known)
    return Command(command.opcode, command.group_type, command.member_id, rebuilt.data)


def _with_u8(command: Command) -> Command:
    data = bytes((commands.decode_u8_untrusted(command.data),))
    return Command(command.opcode, command.group_type, command.member_id, data)


def _without_data(command: Command) -> Command:
    return Command(command.opcode, command.group_type, command.member_id)


ANEW: Final[Mapping[int, Callable[[Command], Command]]] = {
    Opcode.LIST_QUERY: _without_data,
    Opcode.LIST_USE: _with_bits,
    Opcode.CAP_ID_LIST_QUERY: _without_data,
    Opcode.DEVICE_CAP_GET: _with_capability,
    Opcode.DRIVER_CAP_SET: _with_capability,
    Opcode.RESOURCE_OBJ_CREATE: _with_object,
    Opcode.RESOURCE_OBJ_MODIFY: _with_object,
    Opcode.RESOURCE_OBJ_QUERY: _with_object,
    Opcode.RESOURCE_OBJ_DESTROY: _with_object,
    Opcode.DEV_PARTS_METADATA_GET: _with_request,
    Opcode.DEV_PARTS_GET: _with_request,
    Opcode.DEV_PARTS_SET: _with_parts,
    Opcode.DEV_MODE_SET: _with_u8,
    **dict.fromkeys(LEGACY_OPCODES, lambda command: command),
}
"""Every command of the owner, taken apart by its decoder and put together."""


# --- what must hold -----------------------------------------------------------------------------


def check_answer(written: bytes, writable: int) -> Answer | None:
    """The answer, if the room was enough for a status."""
    assert len(written) <= writable
    assert len(written) == writable or len(written) % ALIGNMENT == 0
    answer = decode_answer_untrusted(written)
    if answer is None:
        assert writable < STATUS_SIZE
        return None
    assert answer.status in set(Status)
    assert answer.qualifier in set(Qualifier)
    assert answer.ok == (answer.qualifier == Qualifier.OK)
    assert not any(written[4:STATUS_SIZE]), "what is reserved is 0"
    if not answer.ok:
        assert not any(answer.result), "a refusal says nothing more"
    return answer


def check_object(driver: Driver, command: Command) -> None:
    """QUERY says what was said of an object."""
    spec = commands.decode_object_spec_untrusted(command.data)
    made = driver.device.objects._objects.get(spec.object_id)
    if command.opcode == Opcode.RESOURCE_OBJ_DESTROY:
        assert made is None, "it is gone"
        return
    assert made is not None, "it is there"
    assert (made.member_id, made.kind) == (command.member_id, spec.kind)
    query = commands.object_query(command.member_id, spec.object_id)
    if query.opcode in driver.device._lists[GroupType.SR_IOV]:
        assert commands.decode_u8_untrusted(driver.result(query)) == spec.kind


def meaning(part: Part) -> object:
    """The value, of tables without their order."""
    if part.type != PartType.CVQ_CFG:
        return part.value
    if part.header.control is ControlCommand.VLAN_ADD:
        return decode_vlans_untrusted(part)
    if part.header.control is ControlCommand.MAC_TABLE_SET:
        table = decode_mac_table_untrusted(part)
        return set(table.unicast), set(table.multicast)
    return part.value


def check_image(driver: Driver, command: Command) -> None:
    """What was set is what is got, and getting and setting it changes nothing."""
    mode = driver.owner.members[command.member_id].mode
    _, _, image = commands.decode_parts_set_untrusted(command.data)
    wanted = {part.header.key: part for part in parse_parts_untrusted(image)}
    got = {part.header.key: part for part in mode.parts()}
    for key in wanted.keys() & got.keys():
        assert meaning(wanted[key]) == meaning(got[key]), "what is set is got"
    before = everything(driver)
    mode.set_parts_untrusted(parse_parts_untrusted(encode_parts(mode.parts())))
    assert everything(driver) == before, "what is got can be set"


def check_done(driver: Driver, command: Command, readable: bytes) -> None:
    """After a command that was accepted, and that does not only ask."""
    if command.opcode in OF_OBJECTS:
        check_object(driver, command)
    elif command.opcode == Opcode.DEV_PARTS_SET:
        check_image(driver, command)
    elif command.opcode == Opcode.DEV_MODE_SET:
        stopped = driver.owner.members[command.member_id].mode.stopped
        assert stopped == bool(commands.decode_u8_untrusted(command.data))
    elif command.opcode == Opcode.LIST_USE:
        used = driver.device._lists[command.group_type]
        assert used == decode_bits_untrusted(command.data)
    elif command.opcode == Opcode.DRIVER_CAP_SET:
        _, value = commands.decode_capability_untrusted(command.data)
        limits = tuple(driver.device.objects._limits.values())
        assert limits == commands.decode_object_limits_untrusted(value)
    before = everything(driver)
    driver.raw(readable)
    assert everything(driver) == before, "once is enough"


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    flags, position = (data[0] if data else 0), 1
    driver, other = an_owner(flags), an_owner(flags)
    while position + _LENGTHS.size <= len(data):
        size, room = _LENGTHS.unpack_from(data, position)
        position += _LENGTHS.size
        readable = data[position : position + size]
        position += size
        writable = ROOM if room == 0xFFFF else room

        command = decode_command_untrusted(readable)
        before = everything(driver)
        written = driver.raw(readable, writable)
        answer = check_answer(written, writable)
        after = everything(driver)
        if answer is not None:
            if not answer.ok:
                assert after == before, "a refusal changes nothing"
            elif command.opcode in ASKING:
                assert after == before, "a question changes nothing"

        accepted = answer is not None and answer.ok
        anew = encode_command(ANEW[command.opcode](command)) if accepted else readable
        assert other.raw(anew, writable) == written, "the same answer"
        assert everything(other) == after, "and the same done"
        if accepted and command.opcode not in ASKING:
            check_done(driver, command, readable)


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
