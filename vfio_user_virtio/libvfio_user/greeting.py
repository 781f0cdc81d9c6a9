"""How libvfio-user comes to serve a connection that we have accepted.

The library listens at a path of its own, accepts, and negotiates the version, all by itself; it
takes no socket.  Ours is a daemon whose sockets come from the service manager, have modes and
groups, or are connected already.  So the library is given a client that says what the real one
said: in a folder that only we can enter the library makes its socket, we connect, pass on the
client's VERSION, and the library's answer back, twin socket and all.  Then the client's socket
takes the place of that stand-in, under the descriptor that the library has for it and hands out
for polling (dup2).

The library never waits here: all that it reads is there before it is asked to.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.libvfio_user.arrival import refuse, take
from vfio_user_virtio.libvfio_user.context import Context
from vfio_user_virtio.protocol.header import HEADER_SIZE, Command, encode_command
from vfio_user_virtio.protocol.version import (
    Version,
    decode_version_reply_untrusted,
    decode_version_request_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.libvfio_user.arrival import Message
    from vfio_user_virtio.libvfio_user.library import Library

_MAX_ANSWER: Final = 4096
_FD_SIZE: Final = array.array("i").itemsize


@contextmanager
def listening_context(library: Library) -> Iterator[tuple[Context, str]]:
    """A context, and the path of its socket, which is gone after the block; the context is not.

    Raises OSError.
    """
    with tempfile.TemporaryDirectory(prefix="vfio-user-virtio-") as folder:
        path = str(Path(folder, "library.sock"))
        yield Context(library, path), path


def greet(context: Context, path: str, sock: socket.socket, message: Message) -> Version:
    """Let `context`, which listens at `path`, negotiate with who sent `message` by `sock`.

    What they have agreed on.  Raises ConnectionLost, also when the library refuses, which the
    client has been told then.
    """
    _check_greeting(sock, message)
    take(sock, message)
    with socket.socket(socket.AF_UNIX) as stand_in:
        stand_in.connect(path)
        stand_in.sendall(encode_command(message.message_id, message.command, message.payload))
        refusal: OSError | None = None
        try:
            context.attach()
        except OSError as error:
            refusal = error
        answer, num_fds = _pass_on(stand_in, sock)
        if refusal is not None:
            raise ConnectionLost(f"libvfio-user refuses VERSION: {refusal.strerror}")
        os.dup2(sock.fileno(), context.poll_fd, inheritable=False)
    return decode_version_reply_untrusted(answer[HEADER_SIZE:], num_fds)


def _check_greeting(sock: socket.socket, message: Message) -> None:
    """Refuse what is no VERSION, as the native engine does; the library only sees sound ones."""
    try:
        _decode_greeting_untrusted(message)
    except ConnectionLost as lost:
        refuse(sock, message, lost.reply_errno)
        raise


def _decode_greeting_untrusted(message: Message) -> None:
    if message.command != Command.VERSION or message.flags:
        raise ConnectionLost(
            f"the first message is command {message.command} with flags {message.flags:#x}, "
            "not VERSION with a reply",
            reply_errno=errno.EINVAL,
        )
    decode_version_request_untrusted(message.payload, len(message.fds))


def _pass_on(stand_in: socket.socket, sock: socket.socket) -> tuple[bytes, int]:
    """The answer, and how many fds it has."""
    answer, fds, _, _ = socket.recv_fds(stand_in, _MAX_ANSWER, 1, socket.MSG_DONTWAIT)
    try:
        socket.send_fds(sock, [answer], fds)
    except OSError as error:
        raise ConnectionLost(f"cannot send: {error.strerror}") from None
    finally:
        for fd in fds:
            os.close(fd)
    return answer, len(fds)
