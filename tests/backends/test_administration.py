"""Lists, capabilities and objects of the software owner: every refusal, and the order of checks."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.administration_rig import OK, Driver, a_config, ready
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    CAPABILITY_OPCODES,
    COMMAND_HEADER_SIZE,
    DEV_PARTS_OPCODES,
    LEGACY_OPCODES,
    Command,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_bits_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.admin_commands import MetadataKind, ObjectKind

SELF, SR_IOV = GroupType.SELF, GroupType.SR_IOV
GET, SET = ObjectKind.GET, ObjectKind.SET
INVALID_GROUP: Final = (Status.EINVAL, Qualifier.INVALID_GROUP)
INVALID_OPCODE: Final = (Status.EINVAL, Qualifier.INVALID_OPCODE)
INVALID_MEMBER: Final = (Status.EINVAL, Qualifier.INVALID_MEMBER)
INVALID_FIELD: Final = (Status.EINVAL, Qualifier.INVALID_FIELD)
ENXIO: Final = (Status.ENXIO, Qualifier.INVALID_FIELD)
EEXIST: Final = (Status.EEXIST, Qualifier.INVALID_FIELD)
ENOSPC: Final = (Status.ENOSPC, Qualifier.INVALID_COMMAND)
EBUSY: Final = (Status.EBUSY, Qualifier.INVALID_COMMAND)


def limits(get: int, set_: int) -> Command:
    return commands.driver_cap_set(0, commands.encode_object_limits(get, set_))


# --- the golden vectors of a driver's set-up ------------------------------------------------------

ZEROS: Final = " 000000000000000000000000 "
SELF_USE: Final = "0100 0000" + ZEROS + "0000000000000000 8303000000000000"
SR_IOV_USE: Final = "0100 0100" + ZEROS + "0000000000000000 03fc030000000000"
CAP_SET: Final = "0900 0000" + ZEROS + "0000000000000000 0000000000000000 0808000000000000"
MEMBER_3: Final = " 0100" + ZEROS + "0300000000000000 "
OBJECT_5: Final = "0000 0000 05000000 "
OBJECT_6: Final = "0000 0000 06000000 "
CREATE_GET: Final = "0a00" + MEMBER_3 + OBJECT_5 + "0000000000000000 0000000000000000"
CREATE_SET: Final = "0a00" + MEMBER_3 + OBJECT_6 + "0000000000000000 0100000000000000"
SIZE: Final = "0e00" + MEMBER_3 + OBJECT_5 + "0000000000000000"
STOP: Final = "1100" + MEMBER_3 + "0100000000000000"
RESUME: Final = "1100" + MEMBER_3 + "0000000000000000"
PARTS_SET: Final = (
    "1000" + MEMBER_3 + OBJECT_6 + "0301 00 00 0000000000000000 01000000 0f "
    "0501 00 00 0200000000000000 08000000 0200020000000000 00000000000000"
)
SELECTED: Final = (
    "0f00" + MEMBER_3 + OBJECT_5 + "0000000000000000 "
    "0301 00 00 0000000000000000 00000000 0401 00 00 0100000000000000 00000000"
)
DESTROY: Final = "0d00" + MEMBER_3 + OBJECT_5
DONE: Final = "0000000000000000 "

GOLDEN: Final = (
    (SELF_USE, 8, DONE),
    (CAP_SET, 8, DONE),
    (SR_IOV_USE, 8, DONE),
    (CREATE_GET, 8, DONE),
    (CREATE_SET, 8, DONE),
    (STOP, 8, DONE),
    (SIZE, 16, DONE + "3c02000000000000"),
    (PARTS_SET, 8, DONE),
    (
        SELECTED,
        80,
        DONE + "0301 00 00 0000000000000000 01000000 0f "
        "0401 00 00 0100000000000000 20000000 0001 ffff 0000 0000 "
        "0000000000000000 0000000000000000 0000000000000000 00000000000000",
    ),
    (RESUME, 8, DONE),
    (DESTROY, 8, DONE),
)
"""What a driver writes, how much it reads, and what that is."""


def test_a_drivers_golden_commands_in_their_order() -> None:
    driver = Driver(*(a_config(number) for number in (1, 2, 3)))
    for readable, writable, written in GOLDEN:
        assert driver.raw(bytes.fromhex(readable), writable) == bytes.fromhex(written), readable


# --- groups, lists, members -----------------------------------------------------------------------


def test_what_each_group_knows() -> None:
    driver = Driver(a_config())
    lists = {Opcode.LIST_QUERY, Opcode.LIST_USE}
    known = decode_bits_untrusted(driver.result(commands.list_query(SELF)))
    assert known == lists | CAPABILITY_OPCODES
    known = decode_bits_untrusted(driver.result(commands.list_query(SR_IOV)))
    assert known == lists | LEGACY_OPCODES | DEV_PARTS_OPCODES
    assert len(driver.result(commands.list_query(SR_IOV))) == 8


def test_the_order_of_validation() -> None:
    driver = Driver(a_config())
    unknown, nobody = 0x7777, 99
    assert driver.status(Command(unknown, 2, nobody)) == INVALID_GROUP
    assert driver.status(Command(unknown, SR_IOV, nobody)) == INVALID_OPCODE
    assert driver.status(Command(Opcode.DEV_PARTS_GET, SR_IOV, nobody)) == INVALID_OPCODE
    driver.set_up()
    assert driver.status(Command(Opcode.DEV_PARTS_GET, SR_IOV, nobody)) == INVALID_MEMBER
    assert driver.status(Command(Opcode.DEV_PARTS_GET, SR_IOV, 0)) == INVALID_MEMBER
    assert driver.status(Command(Opcode.DEVICE_CAP_GET, SELF, 1, b"\1")) == INVALID_MEMBER
    assert driver.status(commands.metadata_get(1, 5, MetadataKind.SIZE)) == ENXIO


def test_without_members_there_is_no_group_of_them() -> None:
    driver = Driver()
    assert driver.status(commands.list_query(SR_IOV)) == INVALID_GROUP
    assert driver.status(commands.list_query(SELF)) == OK
    driver.owner.add_member(a_config())
    assert driver.status(commands.list_query(SR_IOV)) == OK


@pytest.mark.parametrize("opcode", sorted(CAPABILITY_OPCODES))
def test_capabilities_are_the_owners_own(opcode: Opcode) -> None:
    driver = ready(objects=False)
    assert driver.status(Command(opcode, SR_IOV, 1)) == INVALID_OPCODE
    assert driver.status(Command(opcode, SELF, 0)) == OK


@pytest.mark.parametrize("opcode", sorted(DEV_PARTS_OPCODES))
def test_parts_are_of_members_only(opcode: Opcode) -> None:
    assert ready().status(Command(opcode, SELF, 0)) == INVALID_OPCODE


@pytest.mark.parametrize("opcode", [0x12, 0x13, 0x7FFF, 0x8000, 0xFFFF])
def test_opcodes_that_are_not_offered(opcode: int) -> None:
    driver = ready()
    for group, member in ((SELF, 0), (SR_IOV, 1)):
        assert driver.status(Command(opcode, group, member)) == INVALID_OPCODE
        assert driver.status(commands.list_use(group, (0, 1, opcode))) == INVALID_FIELD
    assert driver.status(commands.object_query(1, 5)) == OK, "the lists are as they were"


def test_a_use_list_replaces_the_one_before_and_may_lock_itself_out() -> None:
    driver = ready()
    driver.result(commands.list_use(SR_IOV, (0, 1, Opcode.DEV_MODE_SET)))
    assert driver.status(commands.object_query(1, 5)) == INVALID_OPCODE
    assert driver.status(commands.mode_set(1, stopped=False)) == OK
    driver.result(commands.list_use(SR_IOV, (Opcode.RESOURCE_OBJ_QUERY,)))
    assert driver.status(commands.list_query(SR_IOV)) == INVALID_OPCODE
    assert driver.status(commands.list_use(SR_IOV, (0, 1))) == INVALID_OPCODE
    assert driver.status(commands.list_query(SELF)) == OK, "the other group has its own list"
    assert driver.status(commands.object_query(1, 5)) == OK


def test_list_commands_take_any_member_and_any_length_of_bitmap() -> None:
    driver = Driver(a_config())
    assert driver.status(Command(Opcode.LIST_QUERY, SR_IOV, 0xFFFF_FFFF_FFFF_FFFF)) == OK
    assert driver.status(Command(Opcode.LIST_USE, SR_IOV, 7, b"\3")) == OK
    assert driver.status(Command(Opcode.LIST_USE, SR_IOV, 0, b"\3" + bytes(4096))) == OK
    assert driver.status(Command(Opcode.LIST_USE, SR_IOV, 0, bytes(100) + b"\1")) == INVALID_FIELD
    assert driver.status(Command(Opcode.LIST_USE, SR_IOV, 0)) == OK
    assert driver.status(commands.list_query(SR_IOV)) == INVALID_OPCODE


def test_reset_of_the_owner() -> None:
    driver = ready()
    driver.result(commands.mode_set(1, stopped=True))
    driver.device.reset()
    assert driver.status(commands.object_query(1, 5)) == INVALID_OPCODE
    driver.use(SELF)
    driver.use(SR_IOV)
    assert driver.status(commands.object_query(1, 5)) == ENXIO
    assert driver.status(commands.object_create(1, 5, GET)) == ENOSPC, "no limits are set"
    assert driver.member().mode.stopped


# --- capabilities ---------------------------------------------------------------------------------


def test_capabilities() -> None:
    driver = Driver(a_config(), get_objects=9, set_objects=3)
    driver.use(SELF)
    assert (
        driver.raw(encode_command(commands.cap_id_list_query())).hex() == 16 * "0" + "01" + 14 * "0"
    )
    assert driver.result(commands.device_cap_get(0)) == b"\x09\x03" + bytes(6)
    assert driver.raw(encode_command(commands.device_cap_get(0)), 10) == bytes(8) + b"\x09\x03"
    assert driver.status(commands.device_cap_get(1)) == ENXIO
    assert driver.status(commands.driver_cap_set(1, b"\1\1")) == ENXIO
    assert driver.status(limits(9, 3)) == OK
    assert driver.status(limits(10, 3)) == INVALID_FIELD
    assert driver.status(limits(9, 4)) == INVALID_FIELD
    assert driver.status(commands.driver_cap_set(0, b"\x09\x03" + b"\xff" * 100)) == OK


def test_the_limits_of_a_capability_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="255 at most"):
        Administration(Driver().owner, get_objects=256)


def test_limits_below_what_is_in_use() -> None:
    driver = ready()
    assert driver.status(limits(0, 0)) == EBUSY
    assert driver.status(limits(0, 1)) == EBUSY
    assert driver.status(limits(1, 1)) == OK
    assert driver.status(commands.object_create(1, 7, GET)) == ENOSPC
    driver.result(commands.object_destroy(1, 5))
    assert driver.status(limits(0, 1)) == OK


# --- objects --------------------------------------------------------------------------------------


def test_both_limits_of_objects_and_all_their_ids() -> None:
    driver = Driver(a_config(1), a_config(2))
    driver.set_up(get=255, set_=255)
    for number in range(255):
        driver.result(commands.object_create(1 + number % 2, number, GET))
        driver.result(commands.object_create(1, 0xFFFF_FFFF - number, SET))
    assert len(driver.device.objects) == 510
    assert driver.status(commands.object_create(1, 300, GET)) == ENOSPC
    assert driver.status(commands.object_create(1, 300, SET)) == ENOSPC
    driver.result(commands.object_destroy(1, 0))
    assert driver.status(commands.object_create(1, 300, SET)) == ENOSPC
    assert driver.status(commands.object_create(2, 300, GET)) == OK


def test_before_any_limit_is_set_there_are_no_objects() -> None:
    driver = Driver(a_config())
    driver.use(SR_IOV)
    assert driver.status(commands.object_create(1, 0, GET)) == ENOSPC


def test_one_space_of_ids_for_both_kinds_and_all_members() -> None:
    driver = ready(a_config(1), a_config(2))
    for member, kind in ((1, GET), (1, SET), (2, GET), (2, SET)):
        assert driver.status(commands.object_create(member, 5, kind)) == EEXIST
    driver.result(commands.object_destroy(1, 5))
    assert driver.status(commands.object_create(2, 5, SET)) == OK


def object_data(type_: int, flags: int = 0, kind: int = 0) -> bytes:
    return (
        type_.to_bytes(4, "little")
        + bytes((5, 0, 0, 0))
        + flags.to_bytes(8, "little")
        + bytes((kind,))
    )


@pytest.mark.parametrize(
    ("opcode", "data"),
    [
        (opcode, data)
        for opcode in (Opcode.RESOURCE_OBJ_CREATE, Opcode.RESOURCE_OBJ_MODIFY)
        for data in (
            object_data(1),
            object_data(0, 1),
            object_data(0, 1 << 63),
            object_data(0, 0, 2),
        )
    ]
    + [
        (Opcode.RESOURCE_OBJ_QUERY, object_data(0x200)),
        (Opcode.RESOURCE_OBJ_QUERY, object_data(0, 1)),
        (Opcode.RESOURCE_OBJ_DESTROY, object_data(1)),
        (Opcode.DEV_PARTS_METADATA_GET, object_data(1)),
        (Opcode.DEV_PARTS_METADATA_GET, object_data(0, 3)),
        (Opcode.DEV_PARTS_GET, object_data(1)),
        (Opcode.DEV_PARTS_GET, object_data(0, 2)),
        (Opcode.DEV_PARTS_SET, object_data(1)[:4] + b"\6\0\0\0"),
        (Opcode.DEV_MODE_SET, b"\2"),
        (Opcode.DEV_MODE_SET, b"\x81"),
    ],
)
def test_fields_that_are_not_defined(opcode: Opcode, data: bytes) -> None:
    driver = ready()
    driver.result(commands.mode_set(1, stopped=True))
    assert driver.status(Command(opcode, SR_IOV, 1, data)) == INVALID_FIELD
    assert driver.member().mode.stopped


@pytest.mark.parametrize("member", [1, 2])
def test_objects_that_are_not_there_or_another_members(member: int) -> None:
    driver = ready(a_config(1), a_config(2))
    object_id = 7 if member == 1 else 5
    driver.result(commands.mode_set(member, stopped=True))
    for command in (
        commands.object_modify(member, object_id, GET),
        commands.object_query(member, object_id),
        commands.object_destroy(member, object_id),
        commands.metadata_get(member, object_id, MetadataKind.SIZE),
        commands.parts_get(member, object_id),
        commands.parts_set(member, object_id, b""),
    ):
        assert driver.status(command) == ENXIO


def test_an_object_is_for_one_thing() -> None:
    driver = ready()
    driver.result(commands.mode_set(1, stopped=True))
    assert driver.status(commands.metadata_get(1, 6, MetadataKind.SIZE)) == INVALID_FIELD
    assert driver.status(commands.parts_get(1, 6)) == INVALID_FIELD
    assert driver.status(commands.parts_set(1, 5, b"")) == INVALID_FIELD


def test_modify_and_query() -> None:
    driver = ready()
    driver.set_up(get=1, set_=1)
    assert driver.result(commands.object_query(1, 5)) == bytes(8)
    assert driver.result(commands.object_query(1, 6)) == b"\1" + bytes(7)
    assert driver.status(commands.object_modify(1, 5, GET)) == OK
    assert driver.status(commands.object_modify(1, 5, SET)) == ENOSPC
    assert driver.result(commands.object_query(1, 5)) == bytes(8)
    driver.set_up(get=2, set_=2)
    assert driver.status(commands.object_modify(1, 5, SET)) == OK
    assert driver.result(commands.object_query(1, 5)) == b"\1" + bytes(7)
    assert driver.status(commands.parts_get(1, 5)) == INVALID_FIELD


# --- lengths --------------------------------------------------------------------------------------


def test_what_is_too_short_reads_as_zeros_and_what_is_too_long_does_not_matter() -> None:
    driver = ready()
    for length in range(COMMAND_HEADER_SIZE):
        assert len(driver.raw(bytes(length))) == 16
    stop = encode_command(commands.mode_set(1, stopped=True))
    assert driver.raw(stop[:25]) == bytes(8), "as Linux sends it"
    assert driver.member().mode.stopped
    assert driver.raw(stop[:24]) == bytes(8)
    assert not driver.member().mode.stopped
    assert driver.raw(stop + b"\xff" * 64) == bytes(8)
    assert driver.member().mode.stopped


@pytest.mark.parametrize("writable", [0, 1, 4, 7, 8, 9, 15, 16, 24, 4096])
def test_what_is_written_fits_and_is_a_multiple_of_8_if_it_can(writable: int) -> None:
    driver = ready()
    whole = driver.raw(encode_command(commands.list_query(SR_IOV)))
    assert len(whole) == 16
    written = driver.raw(encode_command(commands.list_query(SR_IOV)), writable)
    assert written == whole[:writable]


# --- Linux ----------------------------------------------------------------------------------------


def test_what_linux_does_is_refused_by_the_text_and_taken_when_asked_for() -> None:
    needed = 0x3E780
    for compat in (False, True):
        driver = Driver(linux_compat=compat)
        assert (driver.status(commands.list_query(SR_IOV)) == OK) is compat, "VFs come later"
        driver.owner.add_member(a_config())
        known = driver.result(commands.list_query(SR_IOV))
        assert (int.from_bytes(known, "little") & needed == needed) is compat
        wanted = (int.from_bytes(known, "little") & 0x3E7FC).to_bytes(8, "little")
        driver.result(Command(Opcode.LIST_USE, SR_IOV, 0, wanted))
        for group in (SELF, SR_IOV):
            assert (driver.status(Command(Opcode.CAP_ID_LIST_QUERY, group, 0)) == OK) is compat
            assert (driver.status(Command(Opcode.DEVICE_CAP_GET, group, 0)) == OK) is compat
            cap_set = Command(Opcode.DRIVER_CAP_SET, group, 0, bytes(8) + b"\xff\xff")
            assert (driver.status(cap_set) == OK) is compat
        created = driver.status(commands.object_create(1, 0, GET))
        assert created == (OK if compat else ENOSPC)
        assert driver.status(commands.mode_set(1, stopped=True)) == OK


# --- anything at all ------------------------------------------------------------------------------

header = st.builds(
    lambda opcode, group, member: (
        opcode.to_bytes(2, "little")
        + group.to_bytes(2, "little")
        + bytes(12)
        + member.to_bytes(8, "little")
    ),
    st.integers(0, 0x14),
    st.integers(0, 2),
    st.sampled_from((0, 1, 2, 3, 1 << 63)),
)
object_header = st.builds(
    lambda type_, object_id: type_.to_bytes(4, "little") + object_id.to_bytes(4, "little"),
    st.sampled_from((0, 0, 0, 1)),
    st.sampled_from((5, 6, 7)),
)
readable = st.one_of(
    st.binary(max_size=80),
    st.builds(bytes.__add__, header, st.binary(max_size=80)),
    st.builds(lambda a, b, c: a + b + c, header, object_header, st.binary(max_size=80)),
)


@given(st.lists(st.tuples(readable, st.integers(0, 64)), max_size=12))
def test_any_bytes_have_an_answer(sent: list[tuple[bytes, int]]) -> None:
    driver = ready(a_config(1), a_config(2))
    for data, writable in sent:
        written = driver.raw(data, writable)
        assert len(written) <= writable
        assert len(written) == writable or len(written) % 8 == 0
        if writable >= 8:
            status, qualifier = written[0], written[2]
            assert status in set(Status)
            assert qualifier in set(Qualifier)
            assert (status == 0) == (qualifier == 0)
