"""A client that goes, or gives up, in any state of a migration: nothing is left over of it, its
member runs for the next one, and nobody else notices."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.backends.member_rig import MAC_A, MAC_B, MAC_C, nothing_comes, ping_pong
from tests.migration.served_rig import RAM_SIZE, holdings, served_rig
from vfio_user_virtio.errors import ClientError, ConnectionLost, RemoteError
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from tests.migration.served_rig import Place, ServedRig
    from vfio_user_virtio.device import ResetCause
    from vfio_user_virtio.testing.net_driver import NetDriver

pytestmark = pytest.mark.usefixtures("engine")

_, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState

SOURCE: Final = {
    "RUNNING": (),
    "RUNNING_P2P": (RUNNING_P2P,),
    "STOP": (STOP,),
    "PRE_COPY": (PRE_COPY,),
    "PRE_COPY_P2P": (PRE_COPY, PRE_COPY_P2P),
    "STOP_COPY": (STOP_COPY,),
    "STOP_COPY by PRE_COPY": (PRE_COPY, STOP_COPY),
    "STOP by STOP_COPY": (STOP_COPY, STOP),
}
"""The states of a source, and the way there."""

WHOLE: Final = 1 << 20
TARGET: Final = {
    "RESUMING": (0, ()),
    "within a header": (7, ()),
    "within an image": (300, ()),
    "an image": (-100, ()),
    "all of it": (WHOLE, ()),
    "STOP": (WHOLE, (STOP,)),
    "RUNNING_P2P": (WHOLE, (RUNNING_P2P,)),
    "RESUMING again": (WHOLE, (STOP, RESUMING)),
}
"""How much a target has of the stream, and where it went from RESUMING."""

source_states = pytest.mark.parametrize("states", SOURCE.values(), ids=SOURCE)
target_states = pytest.mark.parametrize(("count", "states"), TARGET.values(), ids=TARGET)


def check_idle(rig: ServedRig, number: int, *, others: int = 0) -> None:
    """Nothing is left of a migration; `others` are under way."""
    assert rig.objects == (others, others)
    assert rig.devices[number].migration.state is RUNNING
    member = rig.members[number]
    assert not member.mode.stopped
    assert not member.running, "nobody is there to run for"


async def check_next_client(rig: ServedRig, number: int, peer: NetDriver, mac: bytes) -> None:
    """The member serves whoever comes next, migration included."""
    async with rig.guest(number) as place:
        assert await place.state() is RUNNING
        await place.driver.start()
        await ping_pong(place.driver, peer, 1, sender=mac)
        await place.go(PRE_COPY, STOP_COPY, RUNNING)
        await ping_pong(place.driver, peer, 1, sender=mac)
    check_idle(rig, number)


# --- at the source --------------------------------------------------------------------------------


@source_states
@pytest.mark.parametrize("part", [0, 100, WHOLE], ids=["unread", "partly read", "read"])
async def test_a_source_is_lost(states: tuple[MigrationState, ...], part: int) -> None:
    async with served_rig() as rig, rig.guest(1) as peer:
        await peer.driver.start()

        async def once() -> None:
            async with rig.guest(0) as place:
                await place.driver.start()
                await ping_pong(place.driver, peer.driver, 1)
                await place.go(*states)
                if part and await place.state() in (PRE_COPY, PRE_COPY_P2P, STOP_COPY):
                    await place.client.migration_read(part)
                place.client.close()
            check_idle(rig, 0)
            await check_next_client(rig, 0, peer.driver, MAC_A)

        await once()
        before = holdings()
        await once()
        assert holdings() == before


@source_states
async def test_a_source_gives_up(states: tuple[MigrationState, ...]) -> None:
    async with served_rig() as rig, rig.guest(0) as place, rig.guest(1) as peer:
        await place.driver.start()
        await peer.driver.start()
        before = None
        for _ in range(2):
            await ping_pong(place.driver, peer.driver, 1)
            await place.go(*states, RUNNING)
            assert rig.objects == (0, 0)
            await ping_pong(place.driver, peer.driver, 1)
            await place.go(*states)
            await place.client.reset()
            assert await place.state() is RUNNING
            assert rig.objects == (0, 0)
            await place.driver.pci.set_up()
            await place.driver.start()
            before = before or holdings()
        await ping_pong(place.driver, peer.driver, 1)
        assert holdings() == before


@source_states
async def test_the_server_ends(states: tuple[MigrationState, ...]) -> None:
    """Its sessions are cancelled, and its members are left as by a client that went."""
    async with served_rig() as rig:
        with trio.CancelScope() as scope:
            async with rig.guest(0) as place:
                await place.driver.start()
                await place.go(*states)
                scope.cancel()
        check_idle(rig, 0)


# --- at the target --------------------------------------------------------------------------------


async def stream_of(place: Place) -> bytes:
    """What a source saves; it is left in STOP_COPY."""
    await place.go(PRE_COPY, STOP_COPY)
    return await place.read()


async def arrive(
    place: Place, stream: bytes, count: int, states: tuple[MigrationState, ...]
) -> None:
    await place.go(RESUMING)
    if part := stream[:count]:
        await place.client.migration_write(part)
    await place.go(*states)


@target_states
async def test_a_target_is_lost(count: int, states: tuple[MigrationState, ...]) -> None:
    """It never ran, so it has not touched the guest's memory, and nobody heard of the guest there;
    the source goes on in the same memory."""
    with GuestRam(RAM_SIZE) as ram:
        async with served_rig() as rig, rig.guest(0, ram) as source, rig.guest(1) as peer:
            await source.driver.start()
            await peer.driver.start()

            async def once() -> None:
                await ping_pong(source.driver, peer.driver, 1)
                stream = await stream_of(source)
                async with rig.guest(2, ram) as target:
                    await arrive(target, stream, count, states)
                    guest_memory = bytes(ram.view(ram.iova, RAM_SIZE))
                    target.client.close()
                check_idle(rig, 2, others=1)
                assert bytes(ram.view(ram.iova, RAM_SIZE)) == guest_memory
                assert rig.members[2].state.filter.mac == MAC_C
                assert await nothing_comes(peer.driver), "no announcement"
                await source.go(RUNNING)
                await ping_pong(source.driver, peer.driver, 1)
                await check_next_client(rig, 2, peer.driver, MAC_C)

            await once()
            before = holdings()
            await once()
            assert holdings() == before


async def test_a_target_that_cannot_be_reset(caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and released all the same."""
    async with served_rig() as rig, rig.guest(0) as source:
        stream = await stream_of(source)

        async def refuse(cause: ResetCause) -> None:
            raise ClientError(errno.EIO, f"no reset: {cause.name}")

        rig.members[2].reset = refuse  # type: ignore[method-assign]  # a device with a fault
        async with rig.guest(2) as target:
            await arrive(target, stream, WHOLE, (STOP,))
            target.client.close()
        assert "cannot be reset after half a migration: no reset: CLIENT" in caplog.text
        check_idle(rig, 2, others=1)
        assert not rig.members[2].running


@target_states
async def test_a_target_gives_up(count: int, states: tuple[MigrationState, ...]) -> None:
    """By a reset: it is itself again, and can be a target again."""
    async with served_rig() as rig, rig.guest(0) as source, rig.guest(2, source.ram) as target:
        await source.driver.start()
        stream = await stream_of(source)
        for _ in range(2):
            await arrive(target, stream, count, states)
            await target.client.reset()
            assert await target.state() is RUNNING
            assert rig.objects == (1, 1), "the source's"
            assert rig.members[2].state.filter.mac == MAC_C
            assert not rig.members[2].function.common.state.status
        await arrive(target, stream, WHOLE, (RUNNING,))
        assert rig.members[2].function.common.state.status & Status.DRIVER_OK
        await source.go(STOP)
        assert rig.objects == (0, 0)


@target_states
async def test_a_target_that_gives_up_without_a_reset(
    count: int, states: tuple[MigrationState, ...]
) -> None:
    """Only what came whole may run; else the client is told, and is where it was."""
    async with served_rig() as rig, rig.guest(0) as source, rig.guest(2) as target:
        await source.driver.start()
        stream = await stream_of(source)
        await arrive(target, stream, count, states)
        state = await target.state()
        whole = state is not RESUMING or (count == WHOLE and not states)
        if whole:
            await target.go(RUNNING)
        else:
            with pytest.raises(RemoteError):
                await target.go(RUNNING)
            assert await target.state() is RESUMING
            assert rig.objects == (2, 2)
            await target.client.reset()
        assert await target.state() is RUNNING
        assert rig.objects == (1, 1)


# --- while the owner is busy ----------------------------------------------------------------------

SAVING: Final = (PRE_COPY, STOP_COPY, STOP, RUNNING)


@pytest.mark.parametrize("number", range(1, 9))
async def test_a_client_goes_while_the_owner_is_busy(number: int) -> None:
    """Each command of a saving session is under way once when its client goes."""
    async with served_rig() as rig, rig.guest(1) as peer:
        await peer.driver.start()
        reached, goes_on = rig.hold_command(number)

        async def save(place: Place) -> None:
            with pytest.raises(ConnectionLost):
                await place.go(*SAVING)

        async with rig.guest(0) as place, trio.open_nursery() as nursery:
            await place.driver.start()
            nursery.start_soon(save, place)
            await reached.wait()
            place.client.close()
            goes_on.set()
        rig.do_not_hold()
        check_idle(rig, 0)
        await check_next_client(rig, 0, peer.driver, MAC_A)


async def test_how_many_commands_there_are() -> None:
    """Those above are all."""
    async with served_rig() as rig, rig.guest(0) as place:
        await place.driver.start()
        await place.go(*SAVING)
        assert len(rig.owner_rig.queue.take_seen()) == 8


async def test_the_peers_of_a_lost_client() -> None:
    """While one is stopped and then lost, the others talk."""
    async with served_rig(4) as rig, rig.guest(1) as b, rig.guest(2) as c:
        await b.driver.start()
        await c.driver.start()
        async with rig.guest(0) as place:
            await place.driver.start()
            await place.go(STOP_COPY)
            await ping_pong(b.driver, c.driver, sender=MAC_B, to=MAC_C)
            place.client.close()
        await ping_pong(b.driver, c.driver, sender=MAC_B, to=MAC_C)
        check_idle(rig, 0)
