"""An owner that does not answer: what its members' clients are told is true all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.migration.model_rig import Fault, UnreliableQueue
from tests.migration.owner_rig import OwnerRig
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.protocol.migration import MigrationState

if TYPE_CHECKING:
    import trio.testing

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState


async def unreliable() -> tuple[OwnerRig, UnreliableQueue]:
    rig = await OwnerRig().discover()
    queue = UnreliableQueue(rig.administration)
    rig.parts_owner.client = AdminClient(queue)
    return rig, queue


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.HUNG, Fault.CUT])
@pytest.mark.parametrize("start", [RUNNING, STOP])
async def test_a_mode_that_nobody_confirmed_is_taken_back(
    autojump_clock: trio.testing.MockClock, fault: Fault, start: MigrationState
) -> None:
    rig, queue = await unreliable()
    migration, mode = rig.migrations[0], rig.members[0].mode
    await migration.set_state(start)
    queue.arm(fault, 1)
    with pytest.raises(ClientError):
        await migration.set_state(STOP if start is RUNNING else RUNNING)
    assert migration.state in (start, RUNNING_P2P)
    assert mode.stopped == (start is STOP)
    await migration.set_state(RUNNING)
    assert not mode.stopped


async def test_a_mode_that_nobody_knows_is_an_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig, queue = await unreliable()
    migration, mode = rig.migrations[0], rig.members[0].mode
    queue.arm(Fault.LOST, 1)
    queue.then = Fault.HUNG
    with pytest.raises(ClientError, match="the state is ERROR"):
        await migration.set_state(STOP)
    assert mode.stopped
    await migration.device_was_reset()
    assert migration.state is RUNNING
    assert not mode.stopped


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.LOST, Fault.GONE])
async def test_the_next_client_knows_of_a_device_that_may_be_stopped(
    autojump_clock: trio.testing.MockClock, fault: Fault
) -> None:
    rig, queue = await unreliable()
    migration = rig.migrations[0]
    await migration.set_state(STOP)
    queue.arm(fault, 1)
    await migration.client_is_gone()
    assert migration.state is ERROR
    await migration.device_was_reset()
    assert migration.state is RUNNING


async def test_a_function_that_runs_though_it_should_not_is_an_error() -> None:
    rig, queue = await unreliable()
    migration, mode = rig.migrations[0], rig.members[0].mode
    await migration.set_state(STOP)
    mode.function_reset()
    queue.arm(Fault.REFUSED, 1)
    await migration.function_was_reset()
    assert migration.state is ERROR


async def test_a_data_size_leaves_the_object_of_a_target_alone() -> None:
    rig = await OwnerRig().discover()
    source, target = rig.migrations
    await source.set_state(STOP_COPY)
    stream = bytes(source.read(1 << 20))
    await target.set_state(RESUMING)
    assert await target.data_size()
    await target.write(stream)
    await target.set_state(STOP)
    await source.set_state(STOP)
    assert rig.parts_owner.objects_in_use == len(rig.administration.objects) == 0


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.HUNG, Fault.CUT, Fault.GONE])
async def test_an_object_that_may_exist_is_destroyed_later(
    autojump_clock: trio.testing.MockClock, fault: Fault
) -> None:
    rig, queue = await unreliable()
    migration = rig.migrations[0]
    queue.arm(fault, 1)
    with pytest.raises(ClientError):
        await migration.set_state(PRE_COPY)
    assert rig.parts_owner.objects_in_use == 1
    await migration.set_state(PRE_COPY)
    await migration.set_state(RUNNING)
    assert rig.parts_owner.objects_in_use == len(rig.administration.objects) == 0
