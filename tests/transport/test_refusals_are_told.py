"""What the log says of refused commands: once, aloud, if a guest is left without what it needs."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import RemoteError
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
