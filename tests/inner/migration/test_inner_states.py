"""The migration states of physical VFs: every pair of them, commands that are refused, and clients
that go in any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.backends.member_rig import MAC_A, MAC_C, nothing_comes, ping_pong
from tests.inner.physical_rig import left_at_owner, physical_devices, place, started_guest
from tests.migration.guest_move_network import MAC_HOST
from tests.migration.served_rig import go, read_all, state_of
from tests.migration.state_pairs import check_every_pair
from tests.migration.test_client_lost import SOURCE, TARGET
from vfio_user_virtio.migration.states import (
    EVERYTHING,
    PRE_COPY,
    RESUMING,
    RUNNING,
    SAVING,
    STOP_COPY,
    VFIO_USER,
)

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.migration.member_migration import MemberMigration
    from vfio_user_virtio.migration.migratable_device import MigratableDevice
    from vfio_user_virtio.migration.states import Options

CHUNK: Final = 1 << 16


class PhysicalSubject:
    """A VF, again and again the same."""

    def __init__(self, device: MigratableDevice) -> None:
        self.migration = device.migration

    def check(self, *, stopped: bool) -> None:
        """Only the owner knows, and has no command that tells."""

    async def check_idle(self) -> None:
        assert await left_at_owner(self.migration) == 0


async def stream_of(migration: MemberMigration) -> bytes:
    await migration.set_state(STOP_COPY)
    stream = b""
    while piece := migration.read(CHUNK):
        stream += piece
    await migration.set_state(RUNNING)
    return stream


@pytest.mark.parametrize("options", [EVERYTHING, VFIO_USER], ids=["p2p", "vfio_user"])
async def test_every_pair_of_states(inner: InnerFacts, best_way: str, options: Options) -> None:
    async with physical_devices(inner, best_way, "ab", (options, options)) as devices:
        stream = await stream_of(devices["b"].migration)
        subject = PhysicalSubject(devices["a"])

        async def same() -> PhysicalSubject:
            return subject

        await check_every_pair(options, stream, same)


async def test_a_source_is_lost(inner: InnerFacts, best_way: str) -> None:
    """In each state its client goes; the VF runs for the next one, which can migrate."""
    async with (
        physical_devices(inner, best_way, ("a", "peer1")) as devices,
        started_guest(devices["peer1"]) as peer,
    ):
        device = devices["a"]
        for states in SOURCE.values():
            async with started_guest(device) as guest:
                await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
                await go(guest.client, *states)
                if await state_of(guest.client) in SAVING:
                    await guest.client.migration_read(100)
                guest.client.close()
            assert device.migration.state is RUNNING
            assert await left_at_owner(device.migration) == 0


async def test_a_target_is_lost(inner: InnerFacts, best_way: str) -> None:
    """It never ran: nobody heard of its guest there, and the source goes on."""
    async with (
        physical_devices(inner, best_way, ("a", "peer1", "c", "peer2")) as devices,
        started_guest(devices["a"]) as source,
        started_guest(devices["peer1"]) as peer,
        started_guest(devices["peer2"]) as other_peer,
    ):
        target = devices["c"]
        await ping_pong(source.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
        await go(source.client, PRE_COPY, STOP_COPY)
        stream = await read_all(source.client)
        for count, states in TARGET.values():
            async with place(target) as there:
                await go(there.client, RESUMING)
                if part := stream[:count]:
                    await there.client.migration_write(part)
                await go(there.client, *states)
                memory = bytes(there.memory.view(there.memory.iova, there.memory.size))
                there.client.close()
            assert target.migration.state is RUNNING
            assert await left_at_owner(target.migration) == 0
            assert not any(memory), "a target that did not run wrote to its guest's memory"
        assert await nothing_comes(other_peer.driver), "an announcement"
        await go(source.client, RUNNING)
        await ping_pong(source.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
        async with started_guest(target) as guest:
            assert (await guest.driver.config()).mac == MAC_C
