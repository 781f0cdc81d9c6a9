"""The fuzz target of administration commands, on hypothesis' bytes: it runs, and it can find
something."""

from __future__ import annotations

import struct
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz import fuzz_admin
from tests.fuzz.fuzz_admin import GET_OBJECT, OTHERS_OBJECT, SET_OBJECT, an_owner
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.parts_objects import PartsObjects, Refused
from vfio_user_virtio.backends.software.stopped_mode import StoppedMode
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    Command,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_answer_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.admin_commands import MetadataKind, ObjectKind
from vfio_user_virtio.virtio.net_parts import vlan_part
from vfio_user_virtio.virtio.parts import Part, encode_headers, encode_parts

PARTS: Final = tuple(an_owner(0).member().mode.parts())
LIKELY: Final = {
    Opcode.LIST_QUERY: commands.list_query(GroupType.SR_IOV),
    Opcode.LIST_USE: commands.list_use(GroupType.SR_IOV, (0, 1, *range(10, 18))),
    Opcode.LEGACY_COMMON_CFG_WRITE: commands.legacy_write(
        Opcode.LEGACY_COMMON_CFG_WRITE, 1, 14, b"\1\0"
    ),
    Opcode.LEGACY_COMMON_CFG_READ: commands.legacy_read(Opcode.LEGACY_COMMON_CFG_READ, 1, 0),
    Opcode.LEGACY_DEV_CFG_WRITE: commands.legacy_write(Opcode.LEGACY_DEV_CFG_WRITE, 1, 0, b"\2"),
    Opcode.LEGACY_DEV_CFG_READ: commands.legacy_read(Opcode.LEGACY_DEV_CFG_READ, 1, 0),
    Opcode.LEGACY_NOTIFY_INFO: commands.legacy_notify_info(1),
    Opcode.CAP_ID_LIST_QUERY: commands.cap_id_list_query(),
    Opcode.DEVICE_CAP_GET: commands.device_cap_get(0),
    Opcode.DRIVER_CAP_SET: commands.driver_cap_set(0, b"\3\2"),
    Opcode.RESOURCE_OBJ_CREATE: commands.object_create(1, 9, ObjectKind.SET),
    Opcode.RESOURCE_OBJ_MODIFY: commands.object_modify(1, GET_OBJECT, ObjectKind.SET),
    Opcode.RESOURCE_OBJ_QUERY: commands.object_query(1, SET_OBJECT),
    Opcode.RESOURCE_OBJ_DESTROY: commands.object_destroy(1, GET_OBJECT),
    Opcode.DEV_PARTS_METADATA_GET: commands.metadata_get(1, GET_OBJECT, MetadataKind.LIST),
    Opcode.DEV_PARTS_GET: commands.parts_get(1, GET_OBJECT),
    Opcode.DEV_PARTS_SET: commands.parts_set(1, SET_OBJECT, encode_parts(PARTS)),
    Opcode.DEV_MODE_SET: commands.mode_set(1, stopped=True),
}
"""One command of each kind, which is accepted."""
ROOMS: Final = {Opcode.LEGACY_COMMON_CFG_READ: 12, Opcode.LEGACY_DEV_CFG_READ: 9}
"""How much is read is how much room there is."""

ids = st.sampled_from([GET_OBJECT, SET_OBJECT, OTHERS_OBJECT, 9, 10, 11])
kinds = st.sampled_from(ObjectKind)
members = st.sampled_from([0, 1, 1, 1, 2, 3])


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Some parts of a member, some of them with another value, and perhaps one byte changed."""
    parts = draw(st.lists(st.sampled_from(PARTS), max_size=6) | st.just(list(PARTS)))
    added, changed, spoilt = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    if added:
        parts.append(vlan_part(draw(st.sets(st.integers(0, 4095), max_size=4))))
    if parts and changed:
        index = draw(st.integers(0, len(parts) - 1))
        old = parts[index]
        size = len(old.value)
        value = draw(st.binary(min_size=size, max_size=size) | st.binary(max_size=12))
        parts[index] = Part(old.type, value, old.selector, flags=draw(st.integers(0, 1)))
    raw = bytearray(encode_parts(parts))
    if raw and spoilt:
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw) + bytes(draw(st.integers(0, 9)))


likely = st.one_of(
    st.sampled_from(list(LIKELY.values())),
    st.builds(commands.object_create, members, ids, kinds),
    st.builds(commands.object_modify, members, ids, kinds),
    st.builds(commands.object_query, members, ids),
    st.builds(commands.object_destroy, members, ids),
    st.builds(commands.metadata_get, members, ids, st.sampled_from(MetadataKind)),
    st.builds(commands.parts_get, members, ids),
    st.builds(
        lambda member, number, parts: commands.parts_get(
            member, number, encode_headers(part.header for part in parts)
        ),
        members,
        ids,
        st.lists(st.sampled_from(PARTS), max_size=4),
    ),
    st.builds(commands.parts_set, members, st.just(SET_OBJECT) | ids, images()),
    st.builds(
        lambda member, stopped: commands.mode_set(member, stopped=stopped), members, st.booleans()
    ),
    st.builds(commands.list_use, st.sampled_from(GroupType), st.sets(st.integers(0, 20))),
    st.builds(commands.driver_cap_set, st.integers(0, 1), st.binary(max_size=3)),
    st.builds(
        commands.legacy_write,
        st.sampled_from([Opcode.LEGACY_COMMON_CFG_WRITE, Opcode.LEGACY_DEV_CFG_WRITE]),
        members,
        st.integers(0, 40),
        st.binary(max_size=8),
    ),
    st.builds(
        commands.legacy_read,
        st.sampled_from([Opcode.LEGACY_COMMON_CFG_READ, Opcode.LEGACY_DEV_CFG_READ]),
        members,
        st.integers(0, 40),
    ),
    st.builds(Command, st.integers(0, 20), st.integers(0, 2), members, st.binary(max_size=40)),
)


@st.composite
def sent(draw: st.DrawFn) -> bytes:
    """A command as it is in the input, some of them cut or with a byte changed."""
    raw = bytearray(encode_command(draw(likely)))
    if raw and draw(st.integers(0, 3)) == 0:
        raw[draw(st.integers(0, min(len(raw) - 1, 60)))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 7)) == 0:
        del raw[draw(st.integers(0, len(raw))) :]
    return as_input(bytes(raw), draw(st.just(0xFFFF) | st.integers(0, 40)))


def as_input(raw: bytes, room: int = 0xFFFF) -> bytes:
    return struct.pack("<HH", len(raw), room) + raw


@settings(max_examples=100)
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_admin.one_input(data)


@settings(max_examples=120)
@given(st.integers(0, 3), st.lists(sent(), max_size=6))
def test_likely_commands(flags: int, sequence: list[bytes]) -> None:
    fuzz_admin.one_input(bytes((flags,)) + b"".join(sequence))


@pytest.mark.parametrize("opcode", Opcode)
@settings(max_examples=12)
@given(data=st.data())
def test_each_command(opcode: Opcode, data: st.DataObject) -> None:
    """With a byte or two of it changed, and any room."""
    raw = bytearray(encode_command(LIKELY[opcode]))
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    room = data.draw(st.just(ROOMS.get(opcode, 0xFFFF)) | st.integers(0, 64))
    fuzz_admin.one_input(bytes((data.draw(st.integers(0, 3)),)) + as_input(bytes(raw), room))


@pytest.mark.parametrize("opcode", Opcode)
def test_it_reaches_what_each_command_does(opcode: Opcode) -> None:
    raw, room = encode_command(LIKELY[opcode]), ROOMS.get(opcode, 1 << 16)
    answer = decode_answer_untrusted(an_owner(2).raw(raw, room))
    assert answer is not None
    assert answer.ok, answer.describe()
    fuzz_admin.one_input(b"\2" + as_input(raw, min(room, 0xFFFF)))


SOME_IMAGE: Final = b"\0" + as_input(encode_command(LIKELY[Opcode.DEV_PARTS_SET]))


def test_it_finds_a_refusal_that_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(objects: PartsObjects, command: Command, room: int) -> bytes:
        objects._objects.pop(SET_OBJECT, None)
        raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD)

    monkeypatch.setattr(PartsObjects, "execute", refused)
    with pytest.raises(AssertionError):
        fuzz_admin.one_input(SOME_IMAGE)


def test_it_finds_an_image_that_is_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(mode: StoppedMode, parts: list[Part]) -> None:
        set_parts(mode, parts[:3])

    image = encode_parts([*PARTS, vlan_part({7})])
    command = commands.parts_set(1, SET_OBJECT, image)
    set_parts = StoppedMode.set_parts_untrusted
    monkeypatch.setattr(StoppedMode, "set_parts_untrusted", other)
    with pytest.raises(AssertionError, match="what is set is got"):
        fuzz_admin.one_input(b"\0" + as_input(encode_command(command)))


def test_it_finds_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(administration: Administration, command: Command) -> None:
        raise KeyError(command.opcode)

    monkeypatch.setattr(Administration, "_check_untrusted", broken)
    with pytest.raises(KeyError):
        fuzz_admin.one_input(SOME_IMAGE)


def test_it_finds_an_answer_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def longer(administration: Administration, readable: bytes, writable: int) -> bytes:
        return bytes(writable + 8)

    monkeypatch.setattr(Administration, "execute", longer)
    with pytest.raises(AssertionError):
        fuzz_admin.one_input(b"\0" + as_input(b"", 16))
