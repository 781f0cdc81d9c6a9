"""The owner that drives a PF: what it negotiates, what becomes of commands, how it fails."""

from __future__ import annotations

import errno
import gc
import logging
import os

import pytest
import trio
import trio.testing

from tests.backends.administration_rig import a_config
from tests.backends.owner_function_rig import Driven, Pf, driven
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.admin_queue import DeviceTiming
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.vfio.owner import OWNER_IOVA, destroy_stale_objects, owned
from vfio_user_virtio.backends.vfio.owner_watch import keep_up, watched
from vfio_user_virtio.device import ResetCause, VfioIrq
from vfio_user_virtio.errors import DriverError, HostError
from vfio_user_virtio.migration.admin_client import AdminClient, AdminError
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import STATUS_SIZE, GroupType, encode_command
from vfio_user_virtio.virtio.admin_commands import MetadataKind, ObjectKind
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio.virtio.parts import parse_parts_untrusted

QUERY = encode_command(commands.list_query(GroupType.SR_IOV))


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("linux_compat", [True, False])
async def test_it_discovers_what_the_pf_can_do(linux_compat: bool) -> None:
    async with driven(Pf(linux_compat=linux_compat, sr_iov=True)) as made:
        assert feature_names(made.owner.features) == [
            "VERSION_1",
            "ACCESS_PLATFORM",
            "SR_IOV",
            "ADMIN_VQ",
        ]
        support = await made.parts.discover()
        assert (support.lack, support.objects) == (None, 255)
        assert made.owner.failure is None


async def test_nothing_is_left_open() -> None:
    async with driven(Pf()) as made:
        await made.parts.discover()
    before = open_fds()
    async with driven(Pf()) as made:
        await made.parts.discover()
    assert open_fds() == before


async def test_a_closed_owner_leaves_the_pf_reset() -> None:
    pf = Pf()
    async with served(pf.function) as client:
        async with owned(client, "pf") as owner:
            await PartsOwner(AdminClient(owner)).discover()
        assert pf.function.function.common.state.status == 0
        with pytest.raises(DriverError):
            pf.function.memory.views(OWNER_IOVA, 1, False)
        with pytest.raises(HostError, match="has been closed"):
            await owner.execute(QUERY, 16)
        async with owned(client, "pf") as owner:
            assert (await PartsOwner(AdminClient(owner)).discover()).lack is None


# --- devices that it does not take --------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "problem"),
    [
        (Feature.ADMIN_VQ, "does not offer ADMIN_VQ: it cannot be the owner"),
        (Feature.ACCESS_PLATFORM, "does not offer ACCESS_PLATFORM: it may reach memory past"),
    ],
)
async def test_a_pf_that_lacks_something_is_refused(off: Feature, problem: str) -> None:
    before = open_fds()
    with pytest.raises(HostError, match=f"pf: it {problem}"):
        async with driven(Pf(features_off=off.mask)):
            pass
    assert open_fds() == before


async def test_untranslated_access_can_be_allowed() -> None:
    pf = Pf(features_off=Feature.ACCESS_PLATFORM.mask)
    async with served(pf.function) as client, owned(client, "pf", allow_untranslated=True) as owner:
        assert feature_names(owner.features) == ["VERSION_1", "ADMIN_VQ"]


async def test_a_vf_is_no_owner() -> None:
    member = Owner("owner").add_member(a_config())
    async with served(member) as client:
        with pytest.raises(HostError, match="does not offer ADMIN_VQ"):
            async with owned(client, "vf"):
                pass


# --- commands -----------------------------------------------------------------------------------


async def test_many_commands_at_once() -> None:
    async with driven(Pf(members=8)) as made:
        await made.parts.discover()
        async with trio.open_nursery() as nursery:
            for number in range(200):
                command = commands.mode_set(1 + number % 8, stopped=bool(number % 2))
                nursery.start_soon(made.admin.execute, command)
        assert made.owner.outstanding == 0


async def test_as_many_are_under_way_as_the_ring_has_room_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pf = Pf(members=64, timing=DeviceTiming(command=1.0))
    async with driven(pf) as made, trio.open_nursery() as nursery:
        start = trio.current_time()
        for member in range(1, 65):
            readable = encode_command(commands.mode_set(member, stopped=True))
            nursery.start_soon(made.owner.execute, readable, STATUS_SIZE)
        await trio.sleep(0.5)
        assert made.owner.outstanding == limits.ADMIN_RING_SIZE // 2 == 32
        nursery.cancel_scope.deadline = start + 2.5
    assert not nursery.cancel_scope.cancelled_caught


async def test_an_answer_that_comes_late_harms_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pf = Pf(timing=DeviceTiming(command=2.0))
    async with driven(pf) as made:
        hasty = AdminClient(made.owner, seconds=1.0)
        for _ in range(20):
            with pytest.raises(AdminError, match=r"within 1 s") as caught:
                await hasty.execute(commands.list_query(GroupType.SELF), 8)
            assert caught.value.errno == errno.ETIMEDOUT
        assert made.owner.outstanding == 11
        assert made.owner.failure is None
        await trio.sleep(60)
        assert made.owner.outstanding == 0
        assert await made.admin.execute(commands.list_query(GroupType.SELF), 8)


async def test_a_device_that_answers_nothing_stops_taking_commands(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pf = Pf(timing=DeviceTiming(command=1e9))
    async with driven(pf) as made:
        hasty = AdminClient(made.owner, seconds=1.0)
        for _ in range(40):
            with pytest.raises(AdminError, match="within 1 s"):
                await hasty.execute(commands.list_query(GroupType.SELF), 8)
        assert made.owner.outstanding == 32
        await made.owner.recover()
        assert made.owner.outstanding == 0


# --- failures -----------------------------------------------------------------------------------


async def test_needs_reset_is_heard_and_mended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pf = Pf()
    async with driven(pf) as made:
        await made.parts.discover()
        await made.parts.create(1, ObjectKind.GET)
        pf.function._fail(DriverError("for a test"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(HostError, match=r"pf: .*DEVICE_NEEDS_RESET"):
            await made.admin.execute(commands.list_query(GroupType.SELF), 8)
        assert not made.owner.lost.is_set()
        await made.owner.recover()
        parts = PartsOwner(made.admin)
        assert (await parts.discover()).lack is None
        assert await parts.create(1, ObjectKind.GET) == 0, "what was there before is gone"
    assert "its objects and lists are gone" in caplog.text


async def test_commands_under_way_end_with_a_recovery(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pf = Pf(timing=DeviceTiming(command=10.0))
    failures = []
    async with driven(pf) as made:

        async def send() -> None:
            try:
                await made.owner.execute(QUERY, 16)
            except HostError as error:
                failures.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(send)
            await trio.sleep(1)
            await made.owner.recover()
        assert failures == ["pf: it is being reset"] * 3
        assert len(await made.owner.execute(QUERY, 16)) == 16


async def test_a_reset_by_somebody_else_is_noticed_in_time() -> None:
    """The device tells nobody; a command that is not answered makes us look."""
    pf = Pf()
    async with driven(pf) as made:
        await pf.function.reset(ResetCause.CLIENT)
        with pytest.raises(AdminError, match="within"):
            await AdminClient(made.owner, seconds=0.05).execute(
                commands.list_query(GroupType.SELF), 8
            )
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(HostError, match="somebody else has reset it"):
            await made.owner.execute(QUERY, 16)
        await made.owner.recover()
        assert len(await made.owner.execute(QUERY, 16)) == 16


async def test_a_pf_that_goes_away_is_lost() -> None:
    pf = Pf()
    async with served(pf.function) as client, owned(client, "pf") as owner:
        client.close()
        for _ in range(2):
            with pytest.raises(HostError, match=r"hung up|closed on our side"):
                await owner.execute(QUERY, 16)
        owner._look_at_status()
        await owner.lost.wait()


@pytest.mark.parametrize(
    ("index", "reason"), [(VfioIrq.ERR, "it has failed"), (VfioIrq.REQ, "wants it back")]
)
async def test_the_host_is_heard(index: int, reason: str) -> None:
    pf = Pf()
    async with driven(pf) as made:
        interrupts = pf.function.function.interrupts
        os.eventfd_write(interrupts._eventfds[index][0], 1)
        await made.owner.lost.wait()
        with pytest.raises(HostError, match=reason):
            await made.owner.execute(QUERY, 16)


# --- objects ------------------------------------------------------------------------------------


async def test_stale_objects_are_found_and_destroyed() -> None:
    async with driven(Pf()) as made:
        await made.parts.discover()
        for member, kind in ((1, ObjectKind.GET), (2, ObjectKind.SET), (2, ObjectKind.GET)):
            await made.parts.create(member, kind)
        assert await destroy_stale_objects(made.admin, (1, 2), range(8)) == 3
        assert await destroy_stale_objects(made.admin, (1, 2), range(8)) == 0
        with pytest.raises(AdminError, match="member 3"):
            await destroy_stale_objects(made.admin, (3,), range(1))


async def image_of(made: Driven, member: int) -> bytes:
    """All parts of a member that is stopped."""
    object_id = await made.parts.create(member, ObjectKind.GET)
    size = commands.decode_count_untrusted(
        await made.admin.execute(commands.metadata_get(member, object_id, MetadataKind.SIZE), 8)
    )
    image = await made.admin.execute(commands.parts_get(member, object_id), size)
    await made.parts.destroy(member, object_id)
    return image


async def test_a_whole_image_goes_from_one_owner_to_another() -> None:
    here, there = Pf(), Pf()
    here.member(1).function.common.write_untrusted(22, b"\1\0")
    async with driven(here) as source, driven(there) as target:
        for made in (source, target):
            await made.parts.discover()
            await made.admin.execute(commands.mode_set(1, stopped=True))
        image = await image_of(source, 1)
        assert image != await image_of(target, 1)
        object_id = await target.parts.create(1, ObjectKind.SET)
        await target.admin.execute(commands.parts_set(1, object_id, image))
        await target.parts.destroy(1, object_id)
        assert parse_parts_untrusted(await image_of(target, 1)) == parse_parts_untrusted(image)
        for made in (source, target):
            await made.admin.execute(commands.mode_set(1, stopped=False))
    assert there.member(1).function.common.state.queue_select == 1


def migration(made: Driven, member: int) -> MemberMigration:
    return MemberMigration(made.parts, member, name=f"vf{member}", clock=trio.current_time)


async def test_a_member_migrates_by_way_of_two_pfs() -> None:
    """The code that migrates members in process, over two virtqueues."""
    here, there = Pf(), Pf()
    here.member(2).function.common.write_untrusted(22, b"\2\0")
    async with driven(here) as source, driven(there) as target:
        for made in (source, target):
            assert (await made.parts.discover()).lack is None
        leaving, coming = migration(source, 2), migration(target, 2)
        await leaving.set_state(MigrationState.PRE_COPY)
        await leaving.set_state(MigrationState.STOP_COPY)
        await coming.set_state(MigrationState.RESUMING)
        while data := leaving.read(100):
            await coming.write(data)
        await coming.set_state(MigrationState.RUNNING)
        await leaving.set_state(MigrationState.STOP)
        assert here.member(2).mode.stopped
        assert not there.member(2).mode.stopped
        assert there.member(2).function.common.state.queue_select == 2
        assert source.parts.objects_in_use == target.parts.objects_in_use == 0


# --- kept up ------------------------------------------------------------------------------------


async def test_an_owner_that_fails_is_brought_up_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pf = Pf()
    async with driven(pf) as made, trio.open_nursery() as nursery:
        await made.parts.discover()
        nursery.start_soon(keep_up, made.owner, made.parts)
        for _ in range(3):
            await made.parts.create(1, ObjectKind.GET)
            pf.function._fail(DriverError("for a test"))
            assert "DEVICE_NEEDS_RESET" in str(await made.owner.until_failure())
            await trio.sleep(1)
            assert made.owner.failure is None
            assert made.parts.support.lack is None
            assert made.parts.objects_in_use == 0
        nursery.cancel_scope.cancel()


async def test_an_owner_that_does_not_come_up_is_tried_again(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pf = Pf()
    async with driven(pf) as made, trio.open_nursery() as nursery:
        await made.parts.discover()
        nursery.start_soon(keep_up, made.owner, made.parts)
        offered, pf.function.function.common._offered = pf.function.function.common._offered, 0
        pf.function._fail(DriverError("for a test"))
        await trio.sleep(20)
        assert "does not offer VERSION_1, ADMIN_VQ" in str(made.owner.failure)
        pf.function.function.common._offered = offered
        await trio.sleep(limits.MAX_RECOVERY_SECONDS)
        assert made.owner.failure is None
        nursery.cancel_scope.cancel()
    assert caplog.text.count("tried again") == 1


async def test_an_owner_that_is_lost_is_given_up() -> None:
    async with served(Pf().function) as client, owned(client, "pf") as owner:
        parts = PartsOwner(AdminClient(owner))
        client.close()
        owner._look_at_status()
        assert "closed on our side" in str(await keep_up(owner, parts))


async def test_a_device_that_is_lost_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    given_back = trio.Event()
    pf = Pf()
    async with driven(pf) as made:
        async with watched(made.owner, made.parts, given_back.set):
            os.eventfd_write(pf.function.function.interrupts._eventfds[VfioIrq.REQ][0], 1)
            await given_back.wait()
        with pytest.raises(HostError, match="has been closed"):
            await made.owner.execute(QUERY, 16)
    assert "the host wants it back; its VFs cannot migrate" in caplog.text
    assert pf.function.function.common.state.status == 0
