"""What the log says of refused commands: once, aloud, if a guest is left without what it needs."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import DmaAccess, DmaMapping, FeatureOperation
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from vfio_user_virtio.transport.client import Client

MAC = bytes.fromhex("020000000001")


async def map_unsealed(client: Client, iova: int) -> None:
    fd = os.memfd_create("unsealed")
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(RemoteError):
            await client.dma_map(DmaMapping(iova, 4096, DmaAccess.READ, fd, 0))
    finally:
        os.close(fd)


async def test_a_refused_mapping_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vfio_user_virtio.transport.session")
    member = Owner("owner").add_member(MemberConfig(mac=MAC))
    async with served(member) as client:
        await map_unsealed(client, 0)
        await map_unsealed(client, 4096)
    told = [record for record in caplog.records if "refused DMA_MAP" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING, logging.DEBUG]
    assert "F_SEAL_SHRINK" in told[0].message
    assert "share=on" in told[0].message


async def test_a_migration_that_is_refused_is_told_and_a_feature_that_is_not_there_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "vfio_user_virtio.transport.session")
    owner = Owner("owner")
    owner.add_member(MemberConfig(mac=MAC))
    (device,) = (await migratable_members(owner)).values()
    async with served(device) as client:

        async def go(state: MigrationState) -> None:
            await client.feature(
                Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state)
            )

        with pytest.raises(RemoteError):
            await client.feature(0xFFFF, FeatureOperation.GET)
        await go(MigrationState.RESUMING)
        for _ in range(3):
            with pytest.raises(RemoteError):
                await go(MigrationState.RUNNING)
        with pytest.raises(RemoteError):
            await client.migration_write(b"x")
    told = [record for record in caplog.records if "refused" in record.message]
    levels = [record.levelno for record in told]
    assert levels[:3] == [logging.DEBUG, logging.WARNING, logging.WARNING]
    assert levels[3:] == [logging.DEBUG, logging.WARNING]
    assert "the migration stream has no image" in told[1].message
    assert "cannot be continued" in told[2].message, "another reason, and its repetition"
    assert "refused MIG_DATA_WRITE" in told[4].message
