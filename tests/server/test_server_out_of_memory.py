"""A target that runs out of memory while a stream comes in: it says so, and goes on; nothing is
lost at the source."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.server_process import client, served, short_folder
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.limits import MAX_MIGRATION_RECORD, MIB
from vfio_user_virtio.migration.stream import RecordHeader, encode_record_header
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state
from vfio_user_virtio.transport.client import connect_socket
from vfio_user_virtio.transport.device_migration import Migration
from vfio_user_virtio.virtio.part_header import (
    PART_HEADER_SIZE,
    PartHeader,
    PartType,
    encode_part_header,
)
from vfio_user_virtio_server.dial import dial

if TYPE_CHECKING:
    from vfio_user_virtio.transport.client import Client


def limit_memory(pid: int, room: int) -> None:
    """Let a process have so many bytes of address space more than it has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    (size,) = (int(line.split()[1]) for line in status.splitlines() if "VmSize" in line)
    most = 1024 * size + room
    resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


async def go(to: Client, state: MigrationState) -> None:
    await to.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state))


async def fill(to: Client) -> None:
    """Send an image as large as can be, of four parts."""
    await to.migration_write(encode_record_header(RecordHeader(MAX_MIGRATION_RECORD)))
    size = MAX_MIGRATION_RECORD // 4 - PART_HEADER_SIZE
    part = encode_part_header(PartHeader(PartType.DRV_FEATURES, length=size)) + bytes(size)
    for start in range(0, MAX_MIGRATION_RECORD, MIB):
        at = start % len(part)
        await to.migration_write(part[at : at + MIB])


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (24 * MIB, "there was no memory for a record of"),
        (100 * MIB, "no memory to set an image of"),
    ],
)
async def test_a_target_without_memory(room: int, message: str) -> None:
    """It gives out while the image comes in, or when all of it is there and is taken apart."""
    with (
        short_folder() as folder,
        served("--socket-path", folder / "a"),
        served("--socket-path", folder / "b", "--mac", "52:54:00:00:00:0b") as target,
    ):
        limit_memory(target.process.pid, room)
        async with connect_socket(await dial(f"{folder}/b")) as to:
            await go(to, MigrationState.RESUMING)
            with pytest.raises(RemoteError) as caught:
                await fill(to)
            assert caught.value.errno == errno.ENOMEM
            with pytest.raises(RemoteError) as caught:
                await to.migration_write(b"more")
            assert caught.value.errno == errno.ENODEV
            await to.reset()
            async with connect_socket(await dial(f"{folder}/a")) as source:
                await Migration(source, to).run()
        with client(folder / "b"):
            pass
        code, log = target.stop()
        assert code == os.EX_OK
        assert message in log
