"""Moves that do not happen: the guest goes on where it was, loses nothing, and moves later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.backends.member_rig import LONG
from tests.migration.guest_move_rig import rig
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.testing.driver_queue import DeviceBroke
from vfio_user_virtio.testing.guest_move import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.guest_move_rig import Rig
    from vfio_user_virtio.transport.client import Client

pytestmark = pytest.mark.usefixtures("engine")

TARGET_STATES = (
    MigrationState.RESUMING,
    MigrationState.STOP,
    MigrationState.RUNNING_P2P,
    MigrationState.RUNNING,
)
SOURCE_STATES = (
    MigrationState.PRE_COPY,
    MigrationState.PRE_COPY_P2P,
    MigrationState.STOP_COPY,
)


def at_the_change_to(client: Client, state: MigrationState, happen: Callable[[], None]) -> None:
    """Let something happen once, in place of the request for `state`, or as it is made."""
    feature = client.feature

    async def watched(
        index: int, operation: FeatureOperation, data: bytes = b"", *, room: int = 0
    ) -> bytes:
        if (
            index == Feature.MIG_DEVICE_STATE
            and operation & FeatureOperation.SET
            and data[:4] == state.to_bytes(4, "little")
        ):
            client.feature = feature  # type: ignore[method-assign]  # as it was
            happen()
        return await feature(index, operation, data, room=room)

    client.feature = watched  # type: ignore[method-assign]  # for the time of one move


def refuse() -> None:
    raise RemoteError(5, "no")


async def goes_on_and_moves_later(made: Rig) -> None:
    assert made.here == "a"
    await made.traffic.goes_on("a")
    assert made.host.announced == []
    await made.move()
    await made.traffic.goes_on("b")
    await made.finish()


@pytest.mark.parametrize("state", TARGET_STATES, ids=lambda state: state.name)
async def test_the_target_refuses(state: MigrationState) -> None:
    """Even the last step, when the guest's memory is at the target already."""
    async with rig() as made:
        await made.start()
        at_the_change_to(made.places["b"].client, state, refuse)
        with pytest.raises(RemoteError, match=f"the target refuses the change to {state.name}"):
            await made.move()
        await goes_on_and_moves_later(made)


@pytest.mark.parametrize("state", SOURCE_STATES, ids=lambda state: state.name)
async def test_the_source_refuses(state: MigrationState) -> None:
    async with rig() as made:
        await made.start()
        at_the_change_to(made.places["a"].client, state, refuse)
        with pytest.raises(RemoteError, match=f"the source refuses the change to {state.name}"):
            await made.move()
        await goes_on_and_moves_later(made)


@pytest.mark.parametrize("state", TARGET_STATES[:-1], ids=lambda state: state.name)
async def test_cancelled(state: MigrationState) -> None:
    async with rig() as made:
        await made.start()
        with trio.CancelScope() as scope:
            at_the_change_to(made.places["b"].client, state, scope.cancel)
            await made.move()
        assert scope.cancelled_caught
        await goes_on_and_moves_later(made)


async def test_cancelled_too_late() -> None:
    async with rig() as made:
        await made.start()
        with trio.CancelScope() as scope:
            at_the_change_to(made.places["b"].client, MigrationState.RUNNING, scope.cancel)
            await made.move()
        assert made.here == "b"
        await made.traffic.goes_on("b")
        await made.finish()


@pytest.mark.parametrize("state", TARGET_STATES[:-1], ids=lambda state: state.name)
async def test_the_target_goes(state: MigrationState) -> None:
    async with rig() as made:
        await made.start()
        target = made.places["b"].client
        at_the_change_to(target, state, target.close)
        with pytest.raises(ConnectionLost, match="the target"):
            await made.move()
        assert made.here == "a"
        await made.traffic.goes_on("a")
        await made.finish()


async def test_the_source_goes() -> None:
    """With the device the guest stops, for good; nothing runs without it."""
    async with rig() as made:
        await made.start()
        source = made.places["a"].client
        at_the_change_to(source, MigrationState.STOP_COPY, source.close)
        with pytest.raises(ConnectionLost, match="the source"):
            await made.move()
        with trio.fail_after(LONG):
            while made.members["a"].running:
                await trio.lowlevel.checkpoint()
        assert not made.members["b"].running
        assert not made.guest.client.running


async def test_what_a_device_does_not_report_is_noticed() -> None:
    class Forgetful(Place):
        async def written(self) -> set[int]:
            await super().written()
            return set()

    async with rig() as made:
        await made.start()
        source = made.guest.place
        made.places["a"] = made.guest.place = Forgetful(source.client, source.memory)
        with pytest.raises(DeviceBroke, match="pages were written and not reported"):
            await made.move()
        made.places["a"] = made.guest.place = source
        await goes_on_and_moves_later(made)


async def test_what_a_device_writes_after_it_has_stopped_is_noticed() -> None:
    async with rig() as made:
        await made.start()
        memory = made.places["a"].memory

        def write() -> None:
            memory.view(memory.iova + memory.size - 1, 1)[0] ^= 1

        at_the_change_to(made.places["b"].client, MigrationState.RUNNING, write)
        with pytest.raises(DeviceBroke, match="after it had stopped"):
            await made.move()


async def test_a_device_whose_structures_lie_elsewhere() -> None:
    async with rig() as made:
        await made.start()
        pci = made.guest.pci
        theirs = pci.capabilities
        pci.capabilities = [attrs.evolve(each, offset=each.offset + 4) for each in theirs]
        with pytest.raises(DeviceBroke, match="lie elsewhere"):
            await made.move()
        pci.capabilities = theirs
        await goes_on_and_moves_later(made)


async def test_a_target_with_fewer_queues() -> None:
    """Refused by the target, while the source runs."""
    async with rig(member={"queue_pairs": 2}, target={"queue_pairs": 1}, max_pairs=2) as made:
        await made.start()
        with pytest.raises(RemoteError, match="the target refuses MIG_DATA_WRITE"):
            await made.move()
        assert made.here == "a"
        await made.traffic.goes_on("a")
        await made.finish()
