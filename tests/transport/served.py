"""A session and a client over a socketpair, in one process."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import trio

from tests.transport.memory_device import MemoryDevice
from vfio_user_virtio.transport.client import PROPOSAL, Client, ServedMemory, connect_socket
from vfio_user_virtio.transport.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from vfio_user_virtio.device import RemoteMemory
    from vfio_user_virtio.protocol.version import Capabilities


def open_fds() -> int:
    """How many fds this process has."""
    return len(os.listdir("/proc/self/fd"))


class Served:
    """A memory device, the session that serves it, and the socket to be its client on."""

    def __init__(self, device: MemoryDevice) -> None:
        self.device = device
        ours, theirs = socket.socketpair()
        self.session = Session(theirs, device, name="test")
        self.socket = ours
        self.over = trio.Event()
        """The session has ended."""

    async def run(self) -> None:
        await self.session.run()
        self.over.set()


@contextlib.asynccontextmanager
async def served(
    serve: Callable[[RemoteMemory], Awaitable[None]] | None = None,
) -> AsyncIterator[Served]:
    """A session that runs, to be connected to; in the end it must be over, and no fd left."""
    before = open_fds()
    device = MemoryDevice(serve) if serve else MemoryDevice()
    one = Served(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        yield one
        one.socket.close()
        with trio.fail_after(60):
            await one.over.wait()
    device.close()
    assert device.releases == 1
    assert device.serving == 0
    assert open_fds() == before


@contextlib.asynccontextmanager
async def client_of(
    one: Served, *, capabilities: Capabilities = PROPOSAL, memory: ServedMemory | None = None
) -> AsyncIterator[Client]:
    """Be the client of `one`."""
    async with connect_socket(one.socket, capabilities=capabilities, memory=memory) as client:
        yield client
