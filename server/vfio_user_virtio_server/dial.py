"""Connect to a server's socket, and say what to do where that is refused.

More than `transport.client.connect` says: who may use the socket, and which exit code it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.transport.client import connect_socket
from vfio_user_virtio_server import sockets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.transport.client import Client


async def dial(path: str) -> socket.socket:
    """A socket that is connected to the server at `path`.  Raises HostError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    while True:
        result = sock.connect_ex(path)
        if result == 0:
            return sock
        if result != errno.EAGAIN:
            sock.close()
            raise _unreachable(path, result)
        try:
            await trio.sleep(0.05)  # its backlog is full, and there is nothing to wait on
        except trio.Cancelled:
            sock.close()
            raise


@contextlib.asynccontextmanager
async def session(path: str) -> AsyncIterator[Client]:
    """A client of the server at `path`.  Raises HostError if it does not answer as one."""
    connected = False
    try:
        async with connect_socket(await dial(path)) as client:
            connected = True
            yield client
    except ConnectionLost as error:
        if connected:
            raise
        raise HostError(
            f"{path}: {error}; a device serves one client at a time, so is a VM using it?",
            exit_code=os.EX_UNAVAILABLE,
        ) from None


def _unreachable(path: str, error: int) -> HostError:
    match error:
        case errno.ENOENT:
            remedy, exit_code = "is the server running, and with that path?", os.EX_NOINPUT
        case errno.EACCES | errno.EPERM:
            remedy = f"the socket is {sockets.describe_access(path)}; join its group"
            exit_code = os.EX_NOPERM
        case _:
            remedy, exit_code = "no server listens there; start one", os.EX_UNAVAILABLE
    return HostError(
        f"cannot connect to {path}: {os.strerror(error)}; {remedy}", exit_code=exit_code
    )
