"""The guest's packets: echo requests that are sent to it while it moves, and when answers came.

The socket is the one that ping(8) has without privilege (ICMP as datagrams): the kernel numbers and
checks, and gives us the answers to ours alone.  Who may have one is ``net.ipv4.ping_group_range``,
for IPv6 too.

Rejected: to run ``ping``, as each of its versions prints something else and few tell what stays
without an answer; raw sockets, which need a capability and see the whole host's.

Source: icmp(7); RFC 792, RFC 4443 (type, code, checksum, identifier, sequence number).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.words import duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

INTERVAL: Final = 0.02
"""Seconds from one to the next: a fraction of what a guest is stopped."""
PATIENCE: Final = 10.0
"""Seconds in which the first one must be answered."""

GRACE: Final = 0.5
"""Seconds after which one without an answer counts as unanswered."""

_ECHO: Final = struct.Struct(">BBHHH")
assert _ECHO.size == 8
_PAYLOAD: Final = bytes(56)
_KINDS: Final = {
    socket.AF_INET: (socket.IPPROTO_ICMP, 8, 0),
    socket.AF_INET6: (socket.IPPROTO_ICMPV6, 128, 129),
}
"""Protocol, type of a request, type of an answer."""


@attrs.frozen
class Ping:
    """A packet of the guest: when it was sent and answered (None: never), by the spans' clock."""

    sent: float
    answered: float | None


@attrs.frozen
class Answers:
    """What became of some packets: how many, and in seconds how long the slowest answered took,
    None without any, and how long there was none at most."""

    sent: int
    unanswered: int
    slowest: float | None
    silence: float

    @classmethod
    def of(cls, pings: Sequence[Ping]) -> Answers:
        """`pings` in the order in which they were sent."""
        came = sorted(ping.answered for ping in pings if ping.answered is not None)
        took = [ping.answered - ping.sent for ping in pings if ping.answered is not None]
        heard = [*[ping.sent for ping in pings[:1]], *came, *[ping.sent for ping in pings[-1:]]]
        silence = max((then - one for one, then in itertools.pairwise(heard)), default=0.0)
        return cls(len(pings), len(pings) - len(came), max(took, default=None), silence)

    def __str__(self) -> str:
        said = f"{self.sent:,} sent, {self.unanswered:,} unanswered"
        if self.slowest is not None:
            said += f", the slowest after {duration(self.slowest)}"
        return f"{said}; no answer for {duration(self.silence)} at most"


class Pinger:
    """Sends echo requests as long as it is `run`; made by `open_pinger`."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.pings: list[Ping] = []
        self._address = address
        self._sender = sock
        self._receiver = trio.socket.from_stdlib_socket(sock)
        _, self._request, self._answer = _KINDS[sock.family]
        self._heard = trio.Event()
        self._sending = True

    async def run(self) -> None:
        """Until it is closed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            while self._sending:
                self._send()
                await trio.sleep(INTERVAL)

    async def settle(self) -> None:
        """Send no more, and wait for the last answers."""
        self._sending = False
        with trio.move_on_after(GRACE):
            while any(ping.answered is None for ping in self.pings[-int(GRACE / INTERVAL) :]):
                await self._heard.wait()

    def close(self) -> None:
        """End it; of those that went out just now nothing is known."""
        self._sending = False
        self._receiver.close()
        since = trio.current_time() - GRACE
        while self.pings and self.pings[-1].answered is None and self.pings[-1].sent > since:
            self.pings.pop()

    async def answered(self) -> None:
        """Until there is a first answer.  Raises HostError."""
        with trio.move_on_after(PATIENCE):
            while all(ping.answered is None for ping in self.pings):
                await self._heard.wait()
            return
        raise HostError(
            f"{self._address} does not answer echo requests of this host in {PATIENCE:g} s",
            exit_code=os.EX_NOHOST,
        )

    def _send(self) -> None:
        header = _ECHO.pack(self._request, 0, 0, 0, len(self.pings) & 0xFFFF)
        self.pings.append(Ping(trio.current_time(), None))
        with contextlib.suppress(OSError):  # it will have no answer then
            self._sender.send(header + _PAYLOAD)

    async def _receive(self) -> None:
        while True:
            try:
                self.take_untrusted(await self._receiver.recv(1024))
            except trio.ClosedResourceError:
                return
            except OSError:  # nobody there, says some router
                await trio.sleep(INTERVAL)

    def take_untrusted(self, data: bytes) -> None:
        """Take in what came; what is no answer, or a second one, is passed over."""
        if len(data) < _ECHO.size:
            return
        kind, _, _, _, sequence = _ECHO.unpack_from(data)
        last = len(self.pings) - 1
        number = last - ((last - sequence) & 0xFFFF)
        if kind == self._answer and number >= 0 and self.pings[number].answered is None:
            self.pings[number] = attrs.evolve(self.pings[number], answered=trio.current_time())
            self._heard.set()
            self._heard = trio.Event()


@contextlib.asynccontextmanager
async def open_pinger(address: str) -> AsyncIterator[Pinger]:
    """For a host by its address, IPv4 or IPv6, or by name.  Raises HostError."""
    try:
        sock = await _connected(address)
    except PermissionError as error:
        raise HostError(
            f"cannot send echo requests to {address}: {error.strerror}; "
            "no group of yours is in the range of net.ipv4.ping_group_range",
            exit_code=os.EX_NOPERM,
        ) from None
    except OSError as error:
        raise HostError(
            f"cannot send echo requests to {address}: {error.strerror}", exit_code=os.EX_NOHOST
        ) from None
    pinger = Pinger(sock, address)
    try:
        yield pinger
    finally:
        pinger.close()


async def _connected(address: str) -> socket.socket:
    found = await trio.socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)
    family, _, _, _, place = found[0]
    sock = socket.socket(family, socket.SOCK_DGRAM, _KINDS[family][0])
    try:
        sock.setblocking(False)
        sock.connect(place)
    except OSError:
        sock.close()
        raise
    return sock
