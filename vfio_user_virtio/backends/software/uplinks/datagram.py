"""An uplink over a UNIX datagram socket: one raw Ethernet frame per datagram.

The same as QEMU's ``-netdev dgram,local.type=unix,local.path=…,remote.type=unix,remote.path=…``
with the two paths swapped.  Like QEMU we address each datagram and do not connect: a connected
socket would refuse a peer that was started again, until we had something to send.  The price is
that poll does not tell when an unconnected peer has room again, so that is tried every
millisecond, while frames wait and only then.  A peer that is not there loses frames.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.backends.software.uplinks.base import PacketUplink, in_one_piece
from vfio_user_virtio.backends.software.uplinks.unix_socket import bound_unix_socket

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Frame
    from vfio_user_virtio.backends.software.switch import Switch

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 0.001


class DatagramUplink(PacketUplink):
    """An uplink between `local`, which it binds, and `remote`, paths of UNIX sockets."""

    def __init__(self, switch: Switch, *, local: str, remote: str) -> None:
        super().__init__(switch, f"dgram {local}", with_header=False)
        self._local = local
        self._remote = remote
        self._socket: socket.socket | None = None

    async def run(self) -> None:
        """Move frames until cancelled.  Raises HostError if `local` cannot be bound."""
        with bound_unix_socket(self._local, socket.SOCK_DGRAM) as bound:
            self._socket = bound
            reason = await self.serve(bound.fileno())
        _log.error("uplink %s is down: %s; members go on without it", self.name, reason)

    def deliver(self, frame: Frame, size: int) -> bool:
        if self._fd < 0 or self._socket is None:
            return True
        try:
            self._socket.sendmsg(in_one_piece(frame), (), 0, self._remote)
        except BlockingIOError:
            return self._choke()
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return self._choke()
            self.discarded += 1  # nobody there, or too long for the peer
        return True

    async def _until_writable(self, fd: int) -> None:
        await trio.sleep(_RETRY_SECONDS)
