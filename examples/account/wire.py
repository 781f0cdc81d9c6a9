"""Echo requests and replies as they pass at a network device, counted by who sent them.

The frames come from the kernel (an AF_PACKET socket), not from the server: what is counted here
has really been on the wire, and it counts only with the MAC addresses that it should have.

Layout, network byte order: Ethernet destination 6, source 6, type 16; IPv4 version and header
length 8, …, protocol 8 at offset 9; ICMP type 8, code 8, checksum 16, identifier 16, sequence 16.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

ETHERNET: Final = struct.Struct("!6s6sH")
assert ETHERNET.size == 14
ICMP: Final = struct.Struct("!BBHHH")
assert ICMP.size == 8
ETHERTYPE_IPV4: Final = 0x0800
PROTOCOL_ICMP: Final = 1
PROTOCOL_OFFSET: Final = 9
ECHO_REPLY: Final = 0
ECHO_REQUEST: Final = 8
FRAME_BYTES: Final = 2048


@attrs.frozen
class Echo:
    """An ICMP echo message in an Ethernet frame; addresses as text."""

    destination: str
    source: str
    request: bool
    identifier: int
    sequence: int


def parse_echo(frame: bytes) -> Echo | None:
    """The echo message in `frame`, None if there is none."""
    ip = ETHERNET.size
    if len(frame) < ip + 20:
        return None
    destination, source, ethertype = ETHERNET.unpack_from(frame)
    icmp = ip + 4 * (frame[ip] & 0xF)
    if ethertype != ETHERTYPE_IPV4 or frame[ip + PROTOCOL_OFFSET] != PROTOCOL_ICMP:
        return None
    if len(frame) < icmp + ICMP.size:
        return None
    kind, _, _, identifier, sequence = ICMP.unpack_from(frame, icmp)
    if kind not in (ECHO_REPLY, ECHO_REQUEST):
        return None
    return Echo(destination.hex(":"), source.hex(":"), kind == ECHO_REQUEST, identifier, sequence)


class Wire:
    """Counts the echo messages at `sock`; `tell` gets each reply to a request."""

    def __init__(self, sock: socket.socket, tell: Callable[[Echo], None]) -> None:
        self._sock = sock
        self._tell = tell
        self._pending: set[tuple[str, int, int]] = set()
        self.requests: Counter[str] = Counter()
        """By the source's MAC address."""
        self.replies: Counter[str] = Counter()
        """Those that answer a request, by the address that had sent the request."""

    async def run(self) -> None:
        """Until cancelled; the socket is closed then."""
        with trio.socket.from_stdlib_socket(self._sock) as sock:
            while True:
                frame = await sock.recv(FRAME_BYTES)
                if echo := parse_echo(frame):
                    self._take(echo)

    def _take(self, echo: Echo) -> None:
        if echo.request:
            self.requests[echo.source] += 1
            self._pending.add((echo.source, echo.identifier, echo.sequence))
            return
        answered = (echo.destination, echo.identifier, echo.sequence)
        if answered in self._pending:
            self._pending.remove(answered)
            self.replies[echo.destination] += 1
            self._tell(echo)
