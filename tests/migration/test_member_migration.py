"""The translation: which commands each arc sends, and what is left when one of them fails."""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING

import pytest
import trio

from tests.migration.owner_rig import OwnerRig
from tests.migration.state_pairs import check_every_pair
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.private_record import PRIVATE_TAG, PrivateState, encode_private
from vfio_user_virtio.migration.states import EVERYTHING, VFIO_USER, path, supported_states
from vfio_user_virtio.migration.stream import (
    RecordHeader,
    StreamDecoder,
    encode_image,
    encode_private_record,
    encode_record_header,
)
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.virtio.admin import Answer, Opcode, Status
from vfio_user_virtio.virtio.parts import parse_parts_untrusted

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.migration import MigrationFlags

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState

M = Opcode.DEV_MODE_SET
C = Opcode.RESOURCE_OBJ_CREATE
Z = Opcode.DEV_PARTS_METADATA_GET
G = Opcode.DEV_PARTS_GET
W = Opcode.DEV_PARTS_SET
D = Opcode.RESOURCE_OBJ_DESTROY

EXPANDED = {
    (RUNNING, STOP_COPY): [M, C, Z, G],
    (RUNNING, STOP): [M],
    (RUNNING, RESUMING): [M, C],
    (RUNNING, PRE_COPY): [C, Z, G],
    (RUNNING, PRE_COPY_P2P): [M, C, Z, G],
    (PRE_COPY, STOP_COPY): [M, Z, G],
    (PRE_COPY, STOP): [D, M],
    (PRE_COPY, RUNNING_P2P): [D, M],
    (PRE_COPY_P2P, RUNNING): [D, M],
    (STOP_COPY, RUNNING): [D, M],
    (STOP_COPY, RESUMING): [D, C],
    (STOP_COPY, RUNNING_P2P): [D],
    (STOP, RUNNING): [M],
    (STOP, PRE_COPY): [M, C, Z, G],
    (RUNNING_P2P, PRE_COPY): [M, C, Z, G],
}
"""What Linux's driver sends, by its own tables."""


def drain(migration: MemberMigration) -> bytes:
    stream = b""
    while piece := migration.read(100):
        stream += piece
    return stream


async def image_of(rig: OwnerRig) -> bytes:
    """A stream of member 1."""
    await rig.migrations[0].set_state(STOP_COPY)
    stream = drain(rig.migrations[0])
    await rig.migrations[0].set_state(RUNNING)
    rig.queue.take_seen()
    return stream


@pytest.mark.parametrize(("start", "goal"), EXPANDED)
async def test_the_commands_are_those_of_linux(start: MigrationState, goal: MigrationState) -> None:
    rig = await OwnerRig().discover()
    migration = rig.migrations[0]
    await migration.set_state(start)
    rig.queue.take_seen()
    await migration.set_state(goal)
    assert rig.queue.take_seen() == EXPANDED[start, goal]


class SoftwareSubject:
    """Member 1 of an owner of its own."""

    def __init__(self, rig: OwnerRig) -> None:
        self.migration = rig.migrations[0]
        self._rig = rig

    def check(self, *, stopped: bool) -> None:
        assert self._rig.members[0].mode.stopped == stopped

    async def check_idle(self) -> None:
        assert self._rig.parts_owner.objects_in_use == 0
        assert not self._rig.administration.objects


@pytest.mark.parametrize("options", [EVERYTHING, VFIO_USER], ids=["p2p", "vfio_user"])
async def test_every_pair_of_states(options: MigrationFlags) -> None:
    async def subject() -> SoftwareSubject:
        return SoftwareSubject(await OwnerRig(options=options).discover())

    stream = await image_of(await OwnerRig(options=options).discover())
    await check_every_pair(options, stream, subject)


@pytest.mark.parametrize("options", [EVERYTHING, VFIO_USER], ids=["p2p", "vfio_user"])
@pytest.mark.parametrize("status", [Status.EINVAL, Status.ENOMEM, Status.EBUSY])
async def test_any_command_may_fail(options: MigrationFlags, status: Status) -> None:
    """The k-th command fails, for all k: a state that is so, no object lost, and a way back."""
    states = sorted(supported_states(options) - {RESUMING})
    for start in states:
        for goal in states:
            try:
                path(start, goal, options)
            except ClientError:
                continue
            for number in range(1, 12):
                rig = await OwnerRig(options=options).discover()
                migration, mode = rig.migrations[0], rig.members[0].mode
                await migration.set_state(start)
                rig.queue.fail_command(number, status)
                with contextlib.suppress(ClientError):
                    await migration.set_state(goal)
                rig.queue.fault = None
                assert mode.stopped == (migration.state not in (RUNNING, PRE_COPY))
                await migration.set_state(RUNNING)
                assert not mode.stopped
                assert rig.parts_owner.objects_in_use == len(rig.administration.objects)


async def test_a_stream_sets_another_member() -> None:
    rig = await OwnerRig().discover()
    source, target = rig.migrations
    rig.members[0].state.filter.promisc = False
    rig.members[0].state.filter.mac = b"\2\1\1\1\1\1"
    rig.members[0].state.announce = True
    await source.set_state(STOP_COPY)
    stream = drain(source)
    await target.set_state(RESUMING)
    rig.queue.take_seen()
    for index in range(len(stream)):
        await target.write(stream[index : index + 1])
    assert rig.queue.take_seen() == [W]
    await target.set_state(RUNNING)
    state = rig.members[1].state
    assert not state.filter.promisc
    assert state.filter.mac == b"\2\1\1\1\1\1"
    assert state.announce


async def test_a_stream_is_an_image_and_then_what_parts_lack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "vfio_user_virtio.migration.member_migration")
    rig = await OwnerRig().discover()
    records = list(StreamDecoder().feed_untrusted(await image_of(rig)))
    assert "goes without guest_offloads, mac, status, config_generation, isr" in caplog.text
    assert [record.tag for record in records] == [0, PRIVATE_TAG]
    names = {part.name for part in parse_parts_untrusted(bytes(records[0].payload))}
    assert {"DEV_FEATURES", "DEVICE_STATUS", "VQ_CFG queue 4"} <= names


async def test_without_a_holder_the_stream_is_that_of_linux() -> None:
    rig = await OwnerRig(private=False).discover()
    stream = await image_of(rig)
    records = list(StreamDecoder().feed_untrusted(stream))
    assert [record.tag for record in records] == [0]
    assert stream == encode_image(bytes(records[0].payload))


async def test_junk_of_some_kernels_is_stripped(caplog: pytest.LogCaptureFixture) -> None:
    rig = await OwnerRig(private=False).discover()
    image = (await image_of(rig))[16:]
    target = rig.migrations[1]
    await target.set_state(RESUMING)
    await target.write(encode_image(image + bytes(range(1, 9))))
    await target.set_state(RUNNING)
    assert "8 bytes behind the image" in caplog.text


@pytest.mark.parametrize("cut", [0, 5, 15, 16, 17, 100, -1])
async def test_a_stream_that_is_cut_is_refused(cut: int) -> None:
    rig = await OwnerRig(private=False).discover()
    stream = await image_of(rig)
    target = rig.migrations[1]
    await target.set_state(RESUMING)
    await target.write(stream[:cut])
    with pytest.raises(ClientError, match="RESUMING to STOP"):
        await target.set_state(STOP)
    assert target.state is RESUMING
    await target.device_was_reset()
    assert target.state is RUNNING
    assert rig.parts_owner.objects_in_use == 0


async def test_an_image_that_does_not_fit_is_refused_by_name() -> None:
    rig = await OwnerRig(private=False).discover()
    stream = bytearray(await image_of(rig))
    stream[16 + 16] ^= 1
    target = rig.migrations[1]
    await target.set_state(RESUMING)
    with pytest.raises(ClientError, match="DEV_PARTS_SET for member 2 failed"):
        await target.write(bytes(stream))
    with pytest.raises(ClientError) as caught:
        await target.write(b"more")
    assert caught.value.errno == errno.ENODEV


async def test_an_unknown_field_of_a_newer_source_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = await OwnerRig().discover()
    target = rig.migrations[1]
    await target.set_state(RESUMING)
    newer = encode_private(PrivateState(isr=1)) + bytes((99, 0, 0, 0, 1, 0, 0, 0, 7))
    await target.write(encode_private_record(newer))
    assert "field 99" in caplog.text
    await rig.migrations[0].set_state(STOP_COPY)
    await target.write(drain(rig.migrations[0]))
    await target.set_state(RUNNING)


async def test_an_optional_record_is_skipped() -> None:
    rig = await OwnerRig().discover()
    stream = await image_of(rig)
    target = rig.migrations[1]
    await target.set_state(RESUMING)
    await target.write(encode_record_header(RecordHeader(3, 1, 0x1234)) + b"abc" + stream)
    await target.set_state(RUNNING)


async def test_precopy_info_is_that_of_the_kernel(autojump_clock: object) -> None:
    rig = await OwnerRig().discover()
    migration = rig.migrations[0]
    await migration.set_state(PRE_COPY)
    rig.queue.take_seen()
    info = await migration.precopy_info()
    assert info.initial_bytes > 0
    assert rig.queue.take_seen() == [Z]
    first = drain(migration)
    assert len(first) == info.initial_bytes
    info = await migration.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == (0, 0)
    rig.queue.take_seen()
    await trio.sleep(1.1)
    info = await migration.precopy_info()
    assert rig.queue.take_seen() == [Z, Z, G]
    assert info.dirty_bytes == await migration.data_size()
    assert drain(migration) == first
    await migration.set_state(STOP_COPY)
    assert len(drain(migration)) > len(first)


async def test_data_size_makes_an_object_only_where_there_is_none() -> None:
    rig = await OwnerRig().discover()
    migration = rig.migrations[0]
    size = await migration.data_size()
    assert size > 0
    assert rig.queue.take_seen() == [C, Z, D]
    await migration.set_state(PRE_COPY)
    rig.queue.take_seen()
    assert await migration.data_size() == size
    assert rig.queue.take_seen() == [Z]
    assert rig.parts_owner.objects_in_use == 1


async def test_what_the_state_does_not_allow() -> None:
    rig = await OwnerRig().discover()
    migration = rig.migrations[0]
    with pytest.raises(ClientError, match="read from in RUNNING; it can be in STOP_COPY"):
        migration.read(1)
    with pytest.raises(ClientError, match="written to in RUNNING; it can be in RESUMING"):
        await migration.write(b"x")
    with pytest.raises(ClientError, match="asked for precopy info in RUNNING"):
        await migration.precopy_info()


async def test_owners_that_fail_are_told_of_outside_of_arcs_too() -> None:
    rig = await OwnerRig().discover()
    migration = rig.migrations[0]
    rig.queue.fail_command(1)
    with pytest.raises(ClientError, match="RESOURCE_OBJ_CREATE for member 1 failed: EINVAL"):
        await migration.data_size()
    await migration.set_state(PRE_COPY)
    rig.queue.fail_command(1)
    with pytest.raises(ClientError, match="DEV_PARTS_METADATA_GET"):
        await migration.precopy_info()


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
async def test_sizes_that_cannot_be(size: int) -> None:
    rig = await OwnerRig().discover()
    result = size.to_bytes(8, "little")
    rig.queue.fault = lambda c: Answer(0, 0, result) if c.opcode == Z else None
    with pytest.raises(ClientError, match=f"an image has {size} bytes"):
        await rig.migrations[0].set_state(PRE_COPY)
    assert rig.parts_owner.objects_in_use == 0


async def test_an_image_that_grew_is_asked_for_again() -> None:
    rig = await OwnerRig().discover()
    small = iter([40, 41])
    rig.queue.fault = lambda c: (
        Answer(0, 0, n.to_bytes(8, "little"))
        if c.opcode == Z and (n := next(small, None))
        else None
    )
    await rig.migrations[0].set_state(PRE_COPY)
    assert rig.queue.take_seen() == [C, Z, G, Z, G, Z, G]


async def test_an_image_that_keeps_growing_is_given_up() -> None:
    rig = await OwnerRig().discover()
    rig.queue.fault = lambda c: Answer(Status.ENOMEM) if c.opcode == G else None
    with pytest.raises(ClientError) as caught:
        await rig.migrations[0].set_state(PRE_COPY)
    assert caught.value.errno == errno.ENOMEM
    assert rig.queue.take_seen() == [C, *[Z, G] * 4, D]


async def test_a_guest_that_resets_its_function_leaves_the_clients_state() -> None:
    rig = await OwnerRig().discover()
    migration, mode = rig.migrations[0], rig.members[0].mode
    await migration.set_state(STOP)
    seen = [mode.stopped]
    mode.function_reset()
    seen.append(mode.stopped)
    await migration.function_was_reset()
    seen.append(mode.stopped)
    assert seen == [True, False, True]
    assert migration.state is STOP
    await migration.set_state(RUNNING)
    rig.queue.take_seen()
    await migration.function_was_reset()
    assert rig.queue.take_seen() == []


async def test_when_neither_way_works_the_state_is_error() -> None:
    rig = await OwnerRig(options=VFIO_USER).discover()
    migration = rig.migrations[0]
    await migration.set_state(PRE_COPY)
    seen = 0

    def fail_after_the_stop(_: object) -> Answer | None:
        nonlocal seen
        seen += 1
        return Answer(Status.EBUSY) if seen > 1 else None

    rig.queue.fault = fail_after_the_stop
    with pytest.raises(ClientError, match="the state is ERROR"):
        await migration.set_state(STOP_COPY)
    with pytest.raises(ClientError, match="only a reset"):
        await migration.set_state(RUNNING)
    rig.queue.fault = None
    await migration.device_was_reset()
    assert migration.state is RUNNING
    assert not rig.members[0].mode.stopped


async def test_objects_that_cannot_be_destroyed_stay_taken_until_they_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = await OwnerRig(objects=1).discover()
    first, second = rig.migrations
    await first.set_state(PRE_COPY)
    rig.queue.fault = lambda c: Answer(Status.EBUSY) if c.opcode == D else None
    await first.set_state(RUNNING)
    assert "destroying object 0 failed" in caplog.text
    with pytest.raises(ClientError) as caught:
        await second.set_state(PRE_COPY)
    assert caught.value.errno == errno.ENOSPC
    assert second.state is RUNNING
    rig.queue.fault = None
    await second.set_state(PRE_COPY)
    await second.set_state(RUNNING)
    assert rig.parts_owner.objects_in_use == len(rig.administration.objects) == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_who_runs_with_what_was_loaded_is_woken(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Then, and no other time; if that fails, it runs nevertheless."""
    rig = await OwnerRig().discover()
    stream = await image_of(rig)
    woken = 0

    def resumed() -> None:
        nonlocal woken
        assert not rig.members[0].mode.stopped
        woken += 1
        if fails:
            raise ClientError(errno.ENODEV, "the device has gone")

    migration = MemberMigration(
        rig.parts_owner, 1, name="vf", clock=trio.current_time, resumed=resumed
    )
    await migration.set_state(STOP_COPY)
    await migration.set_state(RUNNING)
    await migration.set_state(RESUMING)
    await migration.write(stream)
    await migration.client_is_gone()
    assert woken == 0
    await migration.set_state(RESUMING)
    await migration.write(stream)
    await migration.set_state(RUNNING)
    await migration.set_state(STOP)
    await migration.set_state(RUNNING)
    assert woken == 1
    assert ("vf: waking it up failed: " in caplog.text) == fails
