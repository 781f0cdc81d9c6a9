"""What a session knows, as plain data: for who takes it over, and for who watches it.

A process that takes over a live session (after a crash, or for an upgrade under a running guest)
needs the connected socket at a message boundary, what the device holds, and `SessionState`.  So
these facts are here and nowhere else.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.transport.requests import MessageIds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.protocol.version import Version

_PEER_CREDENTIALS: Final = struct.Struct("iII")
"""pid, uid and gid, as SO_PEERCRED gives them."""


@attrs.define
class SessionState:
    """What a session knows and a successor would have to: plain data, no handles.

    `version` is what was negotiated, None before; `message_ids` numbers our own commands.
    """

    version: Version | None = None
    message_ids: MessageIds = attrs.field(factory=MessageIds)


@attrs.frozen
class SessionStatistics:
    """What a session has done so far.

    `commands` counts the client's by name, those that no specification has as "unknown"; `errors`
    those that were refused; bytes are whole messages.  `version` is None before VERSION.
    """

    commands: Mapping[str, int]
    errors: int
    bytes_received: int
    bytes_sent: int
    version: Version | None


def peer_process(sock: socket.socket) -> int | None:
    """The pid of who is at the other end, None if the kernel does not tell."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    except OSError:
        return None
    pid: int = _PEER_CREDENTIALS.unpack(data)[0]
    return pid or None  # 0 for one in another pid namespace
