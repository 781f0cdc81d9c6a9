"""One end of a connected UNIX stream socket: messages in, messages out, and the fds of both.

Why not `trio.SocketStream`: it knows no ancillary data, and each of its calls costs a pass of the
scheduler.  Here a call of the kernel is tried first and waited for only if it has to be, so that a
register access costs one wake-up: read, answer, sleep.  Measured on a socketpair, 32 bytes there
and back: 17 µs against 25 µs of an echo on `trio.SocketStream`.

The rules of the socket that this class keeps, so that nobody else needs to know them:

- **Fds in.**  Room for all that one read can bring (SCM_MAX_FD).  Those of a frame belong to the
  frame until it is claimed with `Frame.take_fds`; what is unclaimed is closed by the next
  `receive`, or by `close`.  If the kernel had to drop any (MSG_CTRUNC: we are out of fds), nobody
  can say which memory is missing, so the connection is lost.
- **Slow senders.**  From its first byte a message has PARTIAL_MESSAGE_SECONDS.
- **Slow readers.**  `flush` waits until the peer has taken everything; whoever posts much asks
  `full`.  Nothing here grows: who reads commands flushes before it reads more.
- **Headers are never split.**  QEMU gives up on a stream whose first read of a header brings less
  than 16 bytes.  Linux queues what one send brings in pieces of at least `_atomic` bytes, each
  there wholly or not at all; so several messages go in one send only if they fit one piece
  together, and a longer one goes alone: its header is in its first piece.

Errors: `ConnectionLost` when the socket, the framing or the peer's patience is gone.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import (
    KIB,
    MAX_ANCILLARY_FDS,
    MAX_DATA_XFER_SIZE,
    PARTIAL_MESSAGE_SECONDS,
)
from vfio_user_virtio.protocol.framing import Frame, FrameReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfio_user_virtio.protocol.header import Buffer

_READ_SIZE: Final = 32 * KIB
"""A thousand posted writes: some milliseconds of work before other sessions have their turn."""

_LARGE_READ: Final = 256 * KIB
"""As much of one message as a socket buffer can hold; what else there is waits for its turn."""

_FD_SIZE: Final = array.array("i").itemsize
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(MAX_ANCILLARY_FDS * _FD_SIZE)
_READ_FLAGS: Final = socket.MSG_CMSG_CLOEXEC
_SEND_FLAGS: Final = socket.MSG_NOSIGNAL

_MAX_PIECE: Final = 32 * KIB
"""Linux never cuts an AF_UNIX send into smaller pieces than this, given enough SO_SNDBUF."""

_MAX_GATHERED: Final = 256
"""Messages in one send; the kernel takes 1,024 (UIO_MAXIOV)."""


class Endpoint:
    """See the module head.  Owns `sock` and makes it non-blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader()
        self._frames: list[Frame] = []  # of the last read; their unclaimed fds are ours
        self._partial_deadline = 0.0
        self._waited = True  # the last read had to wait, so others had their turn
        self._out: deque[tuple[bytes, Sequence[int], Buffer]] = deque()
        self._out_size = 0
        self._out_done = 0  # bytes of the first message in `_out` that have gone
        self._writing = trio.Lock()
        self._roomy = False
        send_buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._atomic = min(_MAX_PIECE, send_buffer // 2 - 64)
        self.closed = False
        self.bytes_received = 0
        self.bytes_sent = 0

    def fileno(self) -> int:
        """The socket's fd, for who hands the connection over."""
        return self._socket.fileno()

    # --- in -----------------------------------------------------------------------------------

    async def receive(self) -> list[Frame]:
        """The next messages, one or more; none when the peer has closed between two messages.

        Claim the fds of the frames before the next call, which closes those left.  Raises
        ConnectionLost.
        """
        self._close_unclaimed()
        reader = self._reader
        if reader.broken is not None:
            raise reader.broken
        if self._waited:
            self._waited = False
        else:
            await trio.lowlevel.checkpoint()
        while True:
            size = _READ_SIZE if reader.missing <= _READ_SIZE else min(reader.missing, _LARGE_READ)
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY_SIZE, _READ_FLAGS)
            except BlockingIOError:
                await self._wait_readable()
                self._waited = True
                continue
            except ConnectionResetError:  # it closed before it had read all that we sent
                data, ancillary, flags = b"", [], 0
            except OSError as error:
                raise self._lost("receive", error) from None
            fds = _fds_of(ancillary) if ancillary else []
            if flags & socket.MSG_CTRUNC:
                close_fds(fds)
                raise ConnectionLost(
                    "the kernel dropped file descriptors that a message brought: "
                    "the limit of open files is reached (ulimit -n)"
                )
            if not data:
                if reader.partial:
                    raise ConnectionLost("the peer closed the connection in mid-message")
                return []
            self.bytes_received += len(data)
            was_partial = reader.partial
            frames = reader.receive(data, fds)
            if reader.partial and (frames or not was_partial):
                self._partial_deadline = trio.current_time() + PARTIAL_MESSAGE_SECONDS
            if frames:
                self._frames = frames
                return frames

    async def _wait_readable(self) -> None:
        try:
            if not self._reader.partial:
                await trio.lowlevel.wait_readable(self._socket)
                return
            with trio.move_on_at(self._partial_deadline) as scope:
                await trio.lowlevel.wait_readable(self._socket)
        except trio.ClosedResourceError:
            raise ConnectionLost("the connection was closed on our side") from None
        if scope.cancelled_caught:
            raise ConnectionLost(
                f"a message was not complete {PARTIAL_MESSAGE_SECONDS:g} s after its first byte"
            )

    def _close_unclaimed(self) -> None:
        for frame in self._frames:
            if frame.fds:
                close_fds(frame.take_fds())
        self._frames = []

    # --- out ----------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """So much has been posted that it should be flushed before more is."""
        return self._out_size >= _MAX_PIECE or len(self._out) >= _MAX_GATHERED

    def post(self, message: bytes, fds: Sequence[int] = (), tail: Buffer = b"") -> None:
        """Add a whole message to what the next `flush` sends.

        `tail` is the end of the message, if that is so long that it had better not be copied; it
        must not change, and `fds`, which stay the caller's, must stay open, until that flush is
        over.
        """
        if len(tail) > _MAX_PIECE and not self._roomy:
            self._make_room()
        self._out.append((message, fds, tail))
        self._out_size += len(message) + len(tail)

    def _make_room(self) -> None:
        """Let the socket hold a whole message of bulk data.

        The peer then reads while we do something else; with the usual 208 KiB each side went to
        sleep five times for every MiB, and took three times as long (measured).
        """
        self._roomy = True
        with contextlib.suppress(OSError):  # what is wrong with the socket, sending will say
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_DATA_XFER_SIZE)

    async def flush(self) -> None:
        """Send what was posted, by any task; wait for the peer only if it does not read.

        A cancelled flush loses nothing: the next one, by any task, goes on where it stopped.
        Raises ConnectionLost.  Does not suspend if the kernel takes everything at once.
        """
        if self._drain():
            return
        async with self._writing:
            while not self._drain():
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except trio.ClosedResourceError:
                    raise ConnectionLost("the connection was closed on our side") from None

    async def send(self, message: bytes, fds: Sequence[int] = (), tail: Buffer = b"") -> None:
        """`post` and `flush`."""
        self.post(message, fds, tail)
        await self.flush()

    def _drain(self) -> bool:
        """Send until nothing is left (True) or the kernel takes no more (False)."""
        out = self._out
        while out:
            message, fds, tail = out[0]
            try:
                if fds:
                    rights = array.array("i", fds)
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    sent = self._socket.sendmsg([message, tail], ancillary, _SEND_FLAGS)
                    out[0] = (message, (), tail)
                elif self._out_done or tail:
                    rest = _after(self._out_done, message, tail)
                    sent = self._socket.sendmsg(rest, (), _SEND_FLAGS)
                elif len(out) == 1:
                    sent = self._socket.send(message, _SEND_FLAGS)
                else:
                    sent = self._socket.sendmsg(self._gather(), (), _SEND_FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._lost("send", error) from None
            self.bytes_sent += sent
            self._out_size -= sent
            sent += self._out_done
            while out and sent >= (size := len(out[0][0]) + len(out[0][2])):
                out.popleft()
                sent -= size
            self._out_done = sent
        return True

    def _gather(self) -> list[bytes]:
        """The first message, and as many after it as go with it in one piece."""
        gathered: list[bytes] = []
        room = self._atomic
        for message, fds, tail in self._out:
            room -= len(message)
            if gathered and (fds or tail or room < 0 or len(gathered) >= _MAX_GATHERED):
                break
            gathered.append(message)
        return gathered

    # --- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the socket and every fd that came by it and was not claimed.  Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._close_unclaimed()
        close_fds(self._reader.take_fds())
        self._out.clear()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def _lost(self, doing: str, error: OSError) -> ConnectionLost:
        if self.closed:
            return ConnectionLost("the connection was closed on our side")
        if isinstance(error, ConnectionError):
            return ConnectionLost("the peer closed the connection")
        return ConnectionLost(f"cannot {doing}: {error.strerror}")


def _after(done: int, message: bytes, tail: Buffer) -> list[memoryview]:
    """What is left of `message` and its `tail` when `done` bytes have gone."""
    pieces = memoryview(message)[done:], memoryview(tail)[max(0, done - len(message)) :]
    return [piece for piece in pieces if piece]


def _fds_of(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return fds.tolist()


def close_fds(fds: list[int]) -> None:
    """Close and forget all of `fds`; what closing a peer's file reports is the peer's business."""
    while fds:
        try:
            os.close(fds.pop())
        except OSError as error:
            if error.errno == errno.EBADF:  # not the peer's doing: we closed it before
                raise
