"""What is known of a session on libvfio-user, by whoever watches it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.transport.memory_device import BAR0_SIZE, MemoryDevice
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.libvfio_user.session import LibvfioUserSession
from vfio_user_virtio.testing import loopback
from vfio_user_virtio.testing.guest_ram import GuestRam

if TYPE_CHECKING:
    import socket

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.libvfio_user import Library


async def test_what_it_has_done(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[LibvfioUserSession] = []

    def make(sock: socket.socket, device: Device, name: str) -> LibvfioUserSession:
        sessions.append(LibvfioUserSession(library, sock, device, name=name))
        return sessions[-1]

    monkeypatch.setattr(loopback, "make_session", make)
    device = MemoryDevice()
    begin = time.time()
    async with loopback.served(device) as client:
        (session,) = sessions
        await client.region_read(VfioRegion.BAR0, 0, 4)
        with pytest.raises(RemoteError):
            await client.region_read(VfioRegion.BAR0, BAR0_SIZE, 4)  # refused by the library
        with GuestRam(1 << 16) as ram:
            await ram.map(client)
            with pytest.raises(RemoteError):
                await ram.map(client)  # refused by the device
        await client.reset()
        seen = session.statistics()
        assert dict(seen.commands) == {
            "VERSION": 1,
            "REGION_READ": 2,
            "DMA_MAP": 2,
            "DEVICE_RESET": 1,
        }
        assert (seen.errors, seen.bytes_sent) == (1, 0)
        assert seen.bytes_received > 6 * 16
        assert seen.version is not None
        assert (seen.version.major, seen.version.minor) == (0, 0)
        assert begin <= session.connected <= time.time()
        assert session.process == os.getpid()
        over = [session.over]
    over.append(session.over)
    assert over == [False, True]
    device.close()
