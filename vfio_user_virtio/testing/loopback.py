"""A device served to a client in the same event loop, by a real session over a real socket pair."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.transport.client import PROPOSAL, Client, ServedMemory, connect_socket
from vfio_user_virtio.transport.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.protocol.version import Capabilities
    from vfio_user_virtio.transport.listener import Serving


@contextlib.asynccontextmanager
async def ungrouped_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that an exception of the block leaves as it is, in no group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # raised again below
            failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def make_session(sock: socket.socket, device: Device, name: str) -> Serving:
    """The session that `served` runs; to be replaced where another engine is to be tested."""
    return Session(sock, device, name=name)


@contextlib.asynccontextmanager
async def served(
    device: Device,
    *,
    memory: ServedMemory | None = None,
    capabilities: Capabilities = PROPOSAL,
    name: str = "loopback",
) -> AsyncIterator[Client]:
    """A client of `device`, for the length of the block; the session has ended after it.

    `memory` is what the device reaches by DMA_READ and DMA_WRITE, a `GuestRam` for example.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    session = make_session(theirs, device, name)
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(session.run)
        async with connect_socket(ours, capabilities=capabilities, memory=memory) as client:
            yield client
