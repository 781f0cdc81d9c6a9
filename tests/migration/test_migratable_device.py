"""Migration as a client sees it: features and stream on the wire, resets, and its own end."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
import trio

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.migration.states import EVERYTHING, VFIO_USER
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    MigrationFlags,
    MigrationState,
    decode_data_size_untrusted,
    decode_device_state_reply_untrusted,
    decode_migration_flags_untrusted,
    encode_device_state,
)
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from vfio_user_virtio.migration.migratable_device import MigratableDevice
    from vfio_user_virtio.migration.states import Options
    from vfio_user_virtio.transport.client import Client

GET, SET, PROBE = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState


async def device(number: int = 1, options: Options = EVERYTHING) -> MigratableDevice:
    """The only member of an owner of its own."""
    owner = Owner(f"owner{number}")
    owner.add_member(MemberConfig(mac=bytes((2, 0, 0, 0, 0, number))))
    return (await migratable_members(owner, options=options))[1]


async def state_of(client: Client) -> MigrationState:
    return decode_device_state_reply_untrusted(
        await client.feature(Feature.MIG_DEVICE_STATE, GET, room=8)
    )


async def go(client: Client, state: MigrationState) -> None:
    await client.feature(Feature.MIG_DEVICE_STATE, SET, encode_device_state(state))
    assert await state_of(client) is state


async def read_all(client: Client, count: int = 300) -> bytes:
    stream = b""
    while len(piece := await client.migration_read(count)) == count:
        stream += piece
    return stream + piece


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (EVERYTHING, MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY),
        (VFIO_USER, MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY),
    ],
)
async def test_what_is_offered(options: Options, flags: MigrationFlags) -> None:
    async with served(await device(options=options)) as client:
        data = await client.feature(Feature.MIGRATION, GET, room=8)
        assert decode_migration_flags_untrusted(data) == flags
        assert await state_of(client) is RUNNING
        size = await client.feature(Feature.MIG_DATA_SIZE, GET, room=8)
        assert decode_data_size_untrusted(size) > 100
        for state in (RUNNING_P2P, PRE_COPY_P2P):
            if flags & MigrationFlags.P2P:
                await go(client, state)
            else:
                with pytest.raises(RemoteError) as caught:
                    await go(client, state)
                assert caught.value.errno == errno.EINVAL


PROBES = {
    Feature.MIGRATION: GET,
    Feature.MIG_DEVICE_STATE: GET | SET,
    Feature.MIG_DATA_SIZE: GET,
}


@pytest.mark.parametrize("feature", PROBES)
async def test_probes(feature: Feature) -> None:
    async with served(await device()) as client:
        await client.feature(feature, PROBE | PROBES[feature])
        if not PROBES[feature] & SET:
            with pytest.raises(RemoteError) as caught:
                await client.feature(feature, PROBE | SET)
            assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("index", [0, 3, 5, 10, 0xFFFF])
async def test_features_that_are_not_there(index: int) -> None:
    async with served(await device()) as client:
        for operation in (GET, SET, PROBE, PROBE | GET):
            with pytest.raises(RemoteError) as caught:
                await client.feature(index, operation)
            assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize("precopy", [False, True])
async def test_a_device_moves(*, precopy: bool) -> None:
    source, target = await device(1), await device(2)
    async with served(source) as here, served(target) as there:
        pci = await VirtioPci.open(here)
        await pci.reset()
        await go(there, RESUMING)
        if precopy:
            await go(here, PRE_COPY)
            initial, dirty = await here.precopy_info()
            stream = await read_all(here)
            assert (initial, dirty) == (len(stream), 0)
            await there.migration_write(stream)
            assert await here.precopy_info() == (0, 0)
        await go(here, STOP_COPY)
        await there.migration_write(await read_all(here))
        await go(there, RUNNING)
        await go(here, STOP)
        pci.close()


async def test_a_reset_by_the_client_ends_the_migration() -> None:
    async with served(await device()) as client:
        for state in (PRE_COPY, STOP_COPY, RESUMING, STOP, PRE_COPY_P2P):
            await go(client, state)
            await client.reset()
            assert await state_of(client) is RUNNING


async def test_a_reset_by_the_guest_does_not() -> None:
    one = await device()
    async with served(one) as client:
        pci = await VirtioPci.open(client)
        await go(client, PRE_COPY)
        await pci.function_level_reset()
        assert await state_of(client) is PRE_COPY
        await go(client, STOP_COPY)
        assert await read_all(client)
        pci.close()


@pytest.mark.parametrize("state", [PRE_COPY, PRE_COPY_P2P, STOP_COPY, RESUMING, STOP, RUNNING_P2P])
async def test_a_client_that_vanishes_leaves_a_running_device(state: MigrationState) -> None:
    one = await device()
    async with served(one) as client:
        await go(client, state)
        client.close()
    await trio.testing.wait_all_tasks_blocked()
    async with served(one) as client:
        assert await state_of(client) is RUNNING
        await go(client, STOP_COPY)


async def test_what_the_state_does_not_allow_is_refused() -> None:
    async with served(await device()) as client:
        for call in (client.migration_read(10), client.migration_write(b"x")):
            with pytest.raises(RemoteError) as caught:
                await call
            assert caught.value.errno == errno.EINVAL


async def test_sixty_four_members_at_once() -> None:
    """All of one owner's members, each with a session of its own."""
    owner = Owner("owner")
    for number in range(1, 65):
        mac = bytes((2, 0, 0, 0, 0, number))
        owner.add_member(MemberConfig(member_id=number, mac=mac))
    devices = await migratable_members(owner)

    async def there_and_back(one: MigratableDevice) -> None:
        async with served(one) as client:
            await go(client, PRE_COPY)
            await go(client, STOP_COPY)
            stream = await read_all(client)
            await go(client, RESUMING)
            await client.migration_write(stream)
            await go(client, RUNNING)

    async with trio.open_nursery() as nursery:
        for one in devices.values():
            nursery.start_soon(there_and_back, one)
