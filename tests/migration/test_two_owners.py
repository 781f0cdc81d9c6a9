"""Migrations between the members of two owners, under guests that talk: owners that fail at any
command, that have no objects left, or no room for what comes."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.backends.member_rig import MAC_A, ping_pong
from tests.migration.served_rig import served_rig
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.migration.stream import RecordHeader, encode_record_header
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.transport.device_migration import Migration
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import Opcode, encode_command
from vfio_user_virtio.virtio.admin_commands import ObjectKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.migration.served_rig import Place, ServedRig

_, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState


@attrs.frozen
class Two:
    """A guest of one owner, which talks to a peer there, and a target of another."""

    here: ServedRig
    there: ServedRig
    source: Place
    peer: Place
    target: Place

    def migration(self, **options: object) -> Migration:
        made = (self.source.client, self.target.client)
        return Migration(*made, **options)  # type: ignore[arg-type]  # passed on

    async def check_source_goes_on(self) -> None:
        """It runs, its traffic goes on, and a migration can be had of it."""
        assert self.here.devices[0].migration.state is RUNNING
        assert not self.here.members[0].mode.stopped
        await ping_pong(self.source.driver, self.peer.driver, 2)

    async def check_target_is_itself(self) -> None:
        assert self.there.devices[1].migration.state is RUNNING
        assert not self.there.members[1].mode.stopped
        assert self.there.members[1].state.filter.mac != MAC_A

    async def check_it_can_be_done(self) -> None:
        await self.migration().run()
        assert self.there.members[1].state.filter.mac == MAC_A


@contextlib.asynccontextmanager
async def two(*, objects: int = 255) -> AsyncIterator[Two]:
    """The target is the second member of its owner, so that its address is another."""
    async with (
        served_rig(objects=objects) as here,
        served_rig(objects=objects) as there,
        here.guest(0) as source,
        here.guest(1) as peer,
        there.guest(1) as target,
    ):
        await source.driver.start()
        await peer.driver.start()
        yield Two(here, there, source, peer, target)


# --- owners that fail -----------------------------------------------------------------------------

SOURCE_COMMANDS: Final = {True: 7, False: 5}
TARGET_COMMANDS: Final = {True: 6, False: 5}
"""Owner's commands of a whole migration, with PRE_COPY and without."""


async def test_how_many_commands_there_are() -> None:
    for precopy in (True, False):
        async with two() as both:
            await both.migration(precopy=precopy).run()
            for rig, counts in ((both.here, SOURCE_COMMANDS), (both.there, TARGET_COMMANDS)):
                assert len(rig.owner_rig.queue.take_seen()) == counts[precopy]
                assert rig.objects == (0, 0)


CASES: Final = [
    pytest.param(side, precopy, number, id=f"{side} {'pre-copy' if precopy else 'stop'} {number}")
    for side, counts in (("source", SOURCE_COMMANDS), ("target", TARGET_COMMANDS))
    for precopy, count in counts.items()
    for number in range(1, count + 1)
]


@pytest.mark.parametrize(("side", "precopy", "number"), CASES)
async def test_an_owner_fails_at_any_command(
    side: str, number: int, caplog: pytest.LogCaptureFixture, *, precopy: bool
) -> None:
    async with two() as both:
        rig = both.here if side == "source" else both.there
        rig.fail(number)
        migration = both.migration(precopy=precopy)
        failure: RemoteError | None = None
        try:
            await migration.run()
        except RemoteError as error:
            failure = error
        seen = rig.owner_rig.queue.take_seen()
        rig.do_not_fail()
        warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert any(f"{seen[number - 1].name} for member" in warning for warning in warnings)
        kept = seen[number - 1] is Opcode.RESOURCE_OBJ_DESTROY
        if kept:
            assert failure is None, "that is the owner's to remember, and no reason to stop"
            assert migration.target_runs
            assert sum(rig.objects) <= 2
            await both.target.client.reset()
            await both.source.go(RUNNING)
        else:
            assert failure is not None
            assert f"the {side} refuses" in str(failure)
            assert failure.errno == errno.EINVAL
            assert not migration.target_runs
            assert migration.source_state is RUNNING
            assert both.here.objects == both.there.objects == (0, 0)
        await both.check_source_goes_on()
        await both.check_target_is_itself()
        await both.check_it_can_be_done()
        assert both.here.objects == both.there.objects == (0, 0), "nor is one remembered for ever"


@pytest.mark.parametrize(("side", "precopy", "number"), CASES)
async def test_it_is_cancelled_while_an_owner_is_busy(
    side: str, number: int, *, precopy: bool
) -> None:
    async with two() as both:
        rig = both.here if side == "source" else both.there
        reached, goes_on = rig.hold_command(number)
        migration = both.migration(precopy=precopy)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migration.run)
            await reached.wait()
            nursery.cancel_scope.cancel()
            goes_on.set()
        rig.do_not_hold()
        assert both.here.objects == both.there.objects == (0, 0)
        if migration.target_runs:
            assert both.there.members[1].state.filter.mac == MAC_A
            await both.target.client.reset()
            await both.source.go(RUNNING)
        await both.check_source_goes_on()
        await both.check_target_is_itself()
        await both.check_it_can_be_done()


# --- owners without objects -----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target"])
async def test_all_objects_are_in_use_by_other_migrations(side: str) -> None:
    async with two(objects=2) as both:
        rig = both.here if side == "source" else both.there
        others = rig.owner_rig.migrations[2], rig.owner_rig.migrations[1 if rig is both.here else 0]
        await others[0].set_state(PRE_COPY)
        await others[1].set_state(RESUMING)
        assert rig.objects == (2, 2)
        with pytest.raises(RemoteError, match=f"the {side} refuses the change to ") as caught:
            await both.migration().run()
        assert caught.value.errno == errno.ENOSPC
        assert rig.objects == (2, 2)
        for other in others:
            await other.device_was_reset()
        assert both.here.objects == both.there.objects == (0, 0)
        await both.check_source_goes_on()
        await both.check_target_is_itself()
        await both.check_it_can_be_done()


async def test_who_is_told_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    async with two(objects=1) as both:
        await both.here.owner_rig.migrations[2].set_state(PRE_COPY)
        with pytest.raises(RemoteError):
            await both.migration().run()
    assert "all 1 device-parts objects of the owner are in use" in caplog.text
    assert "wait until other members have been migrated" in caplog.text


@pytest.mark.parametrize("kind", ObjectKind)
async def test_the_table_is_full_of_what_we_do_not_know(kind: ObjectKind) -> None:
    """Objects that somebody else has made: the owner's limit of one kind is reached.  Ids are then
    taken of which we learn one by one."""
    async with two(objects=3) as both:
        rig = both.here if kind is ObjectKind.GET else both.there
        device = rig.owner_rig.administration
        for object_id in (100, 101, 102):
            command = commands.object_create(3, object_id, kind)
            await device.execute(encode_command(command), 64)
        with pytest.raises(RemoteError) as caught:
            await both.migration().run()
        assert caught.value.errno == errno.ENOSPC
        assert rig.objects == (0, 3)
        for object_id in (100, 101, 102):
            await device.execute(encode_command(commands.object_destroy(3, object_id)), 64)
        await both.check_source_goes_on()
        await both.check_target_is_itself()
        await both.check_it_can_be_done()


# --- targets without room -------------------------------------------------------------------------


async def test_an_image_is_larger_than_the_target_allows() -> None:
    async with two() as both:
        both.there.owner_rig.migrations[1]._max_record_size = 600
        with pytest.raises(RemoteError, match="the target refuses MIG_DATA_WRITE") as caught:
            await both.migration().run()
        assert caught.value.errno == errno.ENOMEM
        assert both.here.objects == both.there.objects == (0, 0)
        await both.check_source_goes_on()
        await both.check_target_is_itself()
        both.there.owner_rig.migrations[1]._max_record_size = 1 << 20
        await both.check_it_can_be_done()


async def test_a_hostile_record_is_refused_before_it_is_stored() -> None:
    async with two() as both:
        await both.target.go(RESUMING)
        header = encode_record_header(RecordHeader((64 << 20) + 1))
        with pytest.raises(RemoteError) as caught:
            await both.target.client.migration_write(header)
        assert caught.value.errno == errno.ENOMEM
        with pytest.raises(RemoteError) as caught:
            await both.target.client.migration_write(b"x")
        assert caught.value.errno == errno.ENODEV
        assert await both.target.state() is RESUMING
        await both.target.client.reset()
        await both.check_target_is_itself()
        await both.check_it_can_be_done()
