"""The next message of a connection, seen before libvfio-user takes it: MSG_PEEK, fds and all.

Why the engine looks first: the library hands out neither the descriptors that come with DMA_MAP and
DEVICE_SET_IRQS nor any news of DMA logging, and some messages it does not survive.  A peek gives
the engine copies of the descriptors of its own, and costs one system call.

Those few commands are small, and are given out when all of them is there.  Of any other only the
header is looked at.  The library asks the kernel for header and body separately and takes what is
there of the body for all of it; SO_RCVLOWAT makes that call wait for the whole, which may be larger
than a socket can hold.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import termios
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import KIB, MAX_ANCILLARY_FDS
from vfio_user_virtio.protocol.header import (
    HEADER_SIZE,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    decode_header_untrusted,
    encode_error_reply,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType
    from typing import Self

_PEEK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_SO_PEEK_OFF: Final = 42
"""Where a peek starts (asm-generic/socket.h), -1: at the next byte to be read."""

_FD_SIZE: Final = array.array("i").itemsize
_WHOLE: Final = (1 << 31) - 1
"""For SO_RCVLOWAT: as much as is asked for."""

_MAX_WANTED: Final = 64 * KIB
"""Larger than any message of those that are looked at, and less than a socket holds."""

_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(MAX_ANCILLARY_FDS * _FD_SIZE)


@attrs.define
class Message:
    """A message that is still in the socket.  A context manager, which closes unclaimed `fds`.

    `size` is that of the whole message in bytes; the `payload` is empty unless it was wanted.
    """

    message_id: int
    command: int
    flags: int
    size: int
    payload: bytes
    fds: list[int]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def take_fds(self) -> list[int]:
        """The fds, which are the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds


@attrs.frozen
class Incomplete:
    """The next message has begun and is not all there; this many of its bytes are."""

    size: int


def prepare(sock: socket.socket) -> None:
    """Make `sock` what the library takes it for."""
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WHOLE)


def peek(sock: socket.socket, wanted: Collection[int]) -> Message | Incomplete | None:
    """What comes next on `sock`; None when nothing has come.  Does not wait.

    The payloads of the commands in `wanted` are given out, and their fds.  Raises ConnectionLost
    when the peer has gone, or what comes is no message.
    """
    try:
        head = sock.recv(HEADER_SIZE, _PEEK)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        head = b""
    if not head:
        raise ConnectionLost("the client closed the connection")
    if len(head) < HEADER_SIZE:
        return _incomplete(sock, len(head))
    header = decode_header_untrusted(head)
    if header.flags & TYPE_MASK == REPLY:
        raise ConnectionLost("a reply came, which answers nothing that was asked")
    message = Message(
        header.message_id, header.command, header.flags, header.size, payload=b"", fds=[]
    )
    if header.command not in wanted:
        return message
    if header.size > _MAX_WANTED:
        return message  # without a payload it will be refused
    (queued,) = array.array("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(_FD_SIZE)))
    if queued < header.size:
        return _incomplete(sock, queued)
    data = _peek_with_fds(sock, header.size, message.fds)
    if len(data) < header.size:  # a peek ends after data that brought fds
        data += _peek_at(sock, len(data), header.size - len(data))
    message.payload = data[HEADER_SIZE:]
    if len(data) < header.size:
        with message:
            raise ConnectionLost(f"a message of {header.size} bytes has fds in its middle")
    return message


def _incomplete(sock: socket.socket, size: int) -> Incomplete:
    """Raises ConnectionLost if the rest cannot come any more."""
    with contextlib.suppress(BlockingIOError):
        if not _peek_at(sock, size, 1):
            raise ConnectionLost("the client closed the connection in the middle of a message")
    return Incomplete(size)


def _peek_with_fds(sock: socket.socket, size: int, fds: list[int]) -> bytes:
    data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SIZE, _PEEK)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(content[: len(content) - len(content) % _FD_SIZE])
            fds.extend(found)
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ConnectionLost("the kernel dropped file descriptors: this process has too many")
    return data


def _peek_at(sock: socket.socket, offset: int, size: int) -> bytes:
    sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, offset)
    try:
        return sock.recv(size, _PEEK)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)


def take(sock: socket.socket, message: Message) -> None:
    """Read `message` off the socket, in the library's stead; its fds there are closed.  Waits."""
    missing = message.size
    while missing and (piece := sock.recv(min(missing, _MAX_WANTED))):
        missing -= len(piece)


def refuse(sock: socket.socket, message: Message, errno: int) -> None:
    """Take `message` off the socket and answer it with an error.  Waits for it, and for room.

    Raises ConnectionLost.
    """
    take(sock, message)
    if not message.flags & NO_REPLY:
        try:
            sock.sendall(encode_error_reply(message, errno))
        except OSError as error:
            raise ConnectionLost(f"cannot send: {error.strerror}") from None
