"""An owner that hangs, dawdles or asks for another try: the client has its reply all the same.

QEMU waits 5 s for a reply and gives the migration up then, whose stream is lost.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.migration.owner_rig import OwnerRig
from vfio_user_virtio import limits
from vfio_user_virtio.device import FeatureOperation, ResetCause
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.admin_client import AdminClient, AdminError
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state
from vfio_user_virtio.virtio.admin import Answer, Qualifier, Status, encode_answer
from vfio_user_virtio.virtio.admin_commands import mode_set

if TYPE_CHECKING:
    from vfio_user_virtio.migration.admin_client import AdminQueue

QEMU_SECONDS: Final = 5.0
AGAIN: Final = encode_answer(Answer(Status.EAGAIN, Qualifier.TRYAGAIN), 8)


class Dawdler:
    """`queue`, of which every command takes `seconds`; from number `bad` on, one goes wrong.

    With `hangs` those are never answered, else they are to be sent again.
    """

    def __init__(self, queue: AdminQueue) -> None:
        self._queue = queue
        self.seconds = 0.0
        self.bad = 0
        self.hangs = False

    async def execute(self, readable: bytes, writable: int) -> bytes:
        await trio.sleep(self.seconds)
        self.bad -= 1
        if self.bad < 0:
            if self.hangs:
                await trio.sleep_forever()
            return AGAIN
        return await self._queue.execute(readable, writable)


async def device_of(rig: OwnerRig) -> tuple[MigratableDevice, Dawdler]:
    dawdler = Dawdler(rig.queue)
    dawdler.bad = 1000
    owner = PartsOwner(AdminClient(dawdler))
    rig.migrations[0]._owner = owner
    assert (await owner.discover()).lack is None
    return MigratableDevice(rig.members[0], rig.migrations[0], None), dawdler


async def go_to(device: MigratableDevice, state: MigrationState) -> None:
    await device.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state))


@pytest.mark.parametrize("start", [MigrationState.RUNNING, MigrationState.PRE_COPY])
@pytest.mark.parametrize(
    "goal", [MigrationState.STOP_COPY, MigrationState.RUNNING_P2P, MigrationState.RESUMING]
)
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("seconds", [0, 0.4, 2])
@pytest.mark.parametrize("bad", [0, 1, 2, 4])
async def test_every_request_is_answered_in_time(
    start: MigrationState,
    goal: MigrationState,
    hangs: bool,
    seconds: float,
    bad: int,
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig = OwnerRig()
    device, dawdler = await device_of(rig)
    await go_to(device, start)
    dawdler.bad, dawdler.seconds, dawdler.hangs = bad, seconds, hangs
    began = trio.current_time()
    with contextlib.suppress(ClientError):
        await go_to(device, goal)
    assert trio.current_time() - began < QEMU_SECONDS
    began = trio.current_time()
    await device.reset(ResetCause.CLIENT)
    assert trio.current_time() - began < QEMU_SECONDS
    dawdler.bad, dawdler.seconds = 1000, 0
    await device.reset(ResetCause.CLIENT)
    await go_to(device, MigrationState.STOP_COPY)


async def test_a_request_leaves_time_for_what_comes_after_a_failure(
    autojump_clock: trio.testing.MockClock,
) -> None:
    dawdler = Dawdler(OwnerRig().queue)
    dawdler.hangs = True
    client = AdminClient(dawdler)
    began = trio.current_time()
    with client.request(1):
        for _ in range(50):
            left = began + limits.ADMIN_REQUEST_SECONDS - trio.current_time()
            with pytest.raises(AdminError, match="DEV_MODE_SET for member 1 was not done"):
                await client.execute(mode_set(1, stopped=True))
            took = left - (began + limits.ADMIN_REQUEST_SECONDS - trio.current_time())
            assert took == pytest.approx(left / 2, abs=1e-6)
    began = trio.current_time()
    with pytest.raises(AdminError, match="within 3 s"):
        await client.execute(mode_set(1, stopped=True))
    assert trio.current_time() - began == pytest.approx(limits.ADMIN_COMMAND_SECONDS)
