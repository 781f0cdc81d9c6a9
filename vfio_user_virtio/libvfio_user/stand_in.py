"""A request of the engine's own to the library, in the place of its client.

The library has no function for what only a client may ask of it: to go to another migration state,
for example.  So it is asked by one: for the length of a request the descriptor that the library has
for its client is a socket of ours (dup2), as in `vfio_user_virtio.libvfio_user.greeting`.

The library never waits here: the request is there before it is asked to read it.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.protocol.header import encode_command

if TYPE_CHECKING:
    from vfio_user_virtio.libvfio_user.context import Context


def tell(context: Context, client: socket.socket, command: int, payload: bytes) -> None:
    """Have `context`, whose client is at `client`, take a command that this one has not sent.

    It does not say what came of it.  To be called where `context` is run.  Raises ConnectionLost.
    """
    place = context.poll_fd
    ours, its = socket.socketpair()
    with ours, its:
        os.dup2(its.fileno(), place, inheritable=False)
        try:
            ours.sendall(encode_command(0, command, payload, no_reply=True))
            take(context)
        finally:
            os.dup2(client.fileno(), place, inheritable=False)


def take(context: Context) -> None:
    """Have `context` take and answer what is there.  Raises ConnectionLost."""
    try:
        context.run()
    except OSError as error:
        raise ConnectionLost(f"libvfio-user has given it up: {error.strerror}") from None
