"""An uplink over a UNIX stream socket: each raw Ethernet frame after its length.

The same as QEMU's ``-netdev stream,addr.type=unix,addr.path=…`` and what passt speaks: 4 bytes
big-endian length, then so many bytes of frame.  The peer may be hostile: a length beyond the
largest frame ends the connection before a byte of it is stored, and no more than one frame waits to
be written.  As a client we connect again when the peer has gone, after pauses that double; as a
server we serve one peer at a time.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import HEAD_SIZE, NET_HEADER_SIZE
from vfio_user_virtio.backends.software.uplinks.base import BaseUplink, in_one_piece
from vfio_user_virtio.backends.software.uplinks.unix_socket import bound_unix_socket
from vfio_user_virtio.virtio.offload import NO_NET_HEADER

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Buffer, Frame
    from vfio_user_virtio.backends.software.switch import Switch

_log = logging.getLogger(__name__)

_LENGTH: Final = struct.Struct("!I")
_BUFFER_SIZE: Final = 4 * (_LENGTH.size + limits.MAX_FRAME_SIZE)
_HEAD: Final = HEAD_SIZE - NET_HEADER_SIZE


class StreamUplink(BaseUplink):
    """The framing, on whatever connection `serve` is given."""

    def __init__(self, switch: Switch, name: str) -> None:
        super().__init__(switch, name)
        self._view = memoryview(bytearray(_BUFFER_SIZE))
        self._begin = self._end = 0
        """The part of the buffer that holds what was received and not yet sent on."""
        self._pending = b""

    async def serve(self, fd: int) -> str | None:
        self._begin = self._end = 0
        self._pending = b""
        return await super().serve(fd)

    # --- to the peer --------------------------------------------------------------------------

    def deliver(self, frame: Frame, size: int) -> bool:
        if self._pending:
            return self._choke()
        length = size - NET_HEADER_SIZE
        message: list[Buffer] = [_LENGTH.pack(length), *in_one_piece(frame)]
        try:
            written = os.writev(self._fd, message)
        except BlockingIOError:
            return self._choke()
        except OSError as error:
            self._fail(_reason(error))
            return True
        if written < _LENGTH.size + length:
            self._pending = b"".join(message)[written:]
            self._choke()
        return True

    def _write_pending(self) -> bool:
        if self._pending:
            try:
                written = os.write(self._fd, self._pending)
            except BlockingIOError:
                return False
            except OSError as error:
                self._fail(_reason(error))
                return True
            self._pending = self._pending[written:]
        return not self._pending

    # --- from the peer ------------------------------------------------------------------------

    def drain(self) -> None:
        if self._fd < 0:
            return
        budget = limits.WORK_BUDGET
        while budget > 0 and not self._starved:
            budget -= 1 + self._send_received_untrusted()
            if self._starved or self._fd < 0 or not self._receive():
                break
        self._switch.flush()

    def _receive(self) -> bool:
        """Read once more; whether anything came."""
        try:
            received = os.readv(self._fd, (self._view[self._end :],))
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(_reason(error))
            return False
        if not received:
            self._fail("the peer closed the connection")
            return False
        self._end += received
        return True

    def _send_received_untrusted(self) -> int:
        """Send on what has been received completely, and move the rest to the front."""
        view, forward = self._view, self._switch.forward
        begin, end = self._begin, self._end
        sent = 0
        while end - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, begin)
            if length > limits.MAX_FRAME_SIZE:
                self._fail(
                    f"the peer announced a frame of {length} bytes; "
                    f"the largest has {limits.MAX_FRAME_SIZE}"
                )
                break
            start = begin + _LENGTH.size
            stop = start + length
            if stop > end:
                break
            cut = min(start + _HEAD, stop)
            frame = (NO_NET_HEADER + view[start:cut], view[cut:stop])
            if not forward(self, frame, NET_HEADER_SIZE + length):
                self._starved = True
                break
            sent += 1
            begin = stop
        self._begin, self._end = begin, end
        if begin and not self._starved:
            view[: end - begin] = bytes(view[begin:end])
            self._begin, self._end = 0, end - begin
        return sent


class StreamClientUplink(StreamUplink):
    """Connects to the UNIX socket at `path`, and again whenever the peer has gone."""

    def __init__(self, switch: Switch, *, path: str) -> None:
        super().__init__(switch, f"stream {path}")
        self._path = path

    async def run(self) -> None:
        """Move frames until cancelled."""
        pause = limits.MIN_RECONNECT_SECONDS
        told = False
        while True:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                try:
                    await connection.connect(self._path)
                except OSError as error:
                    reason: str | None = f"cannot connect: {_reason(error)}"
                else:
                    _log.info("uplink %s is connected", self.name)
                    started = trio.current_time()
                    reason = await self.serve(connection.fileno())
                    told = False
                    if trio.current_time() - started > limits.MAX_RECONNECT_SECONDS:
                        pause = limits.MIN_RECONNECT_SECONDS
            if not told:
                _log.warning("uplink %s is down: %s; trying again", self.name, reason)
                told = True
            await trio.sleep(pause)
            pause = min(2 * pause, limits.MAX_RECONNECT_SECONDS)


class StreamServerUplink(StreamUplink):
    """Listens on the UNIX socket at `path` and serves one peer after the other."""

    def __init__(self, switch: Switch, *, path: str) -> None:
        super().__init__(switch, f"stream {path}")
        self._path = path

    async def run(self) -> None:
        """Move frames until cancelled.  Raises HostError if `path` cannot be bound."""
        with bound_unix_socket(self._path, socket.SOCK_STREAM) as bound:
            bound.listen(1)
            listener = trio.socket.from_stdlib_socket(bound)
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                        raise
                    await trio.sleep(limits.MIN_RECONNECT_SECONDS)
                    continue
                with connection:
                    _log.info("uplink %s is connected", self.name)
                    reason = await self.serve(connection.fileno())
                _log.warning("uplink %s is down: %s; waiting for a peer", self.name, reason)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
