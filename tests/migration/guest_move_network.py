"""The network of guests that move: a host, with a wire to the network of each server.

A wire is a datagram socket to an uplink (`Host`), or whatever else the network of a server can be
reached by (`Network`).  Frames are UDP in IPv4, numbered in each flow.  The host knows where a
guest is as a switch does, by the last frame that came from its address, and sends there; until it
has heard of one, nowhere.  So what it sends to a server that a guest has just left is lost on the
way, and nothing else is.
"""

from __future__ import annotations

import abc
import contextlib
import socket
import struct
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from tests.backends.member_rig import BROADCAST, LONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

MAC_HOST: Final = bytes.fromhex("0200000000f0")
RARP: Final = b"\x80\x35"
_FRAME: Final = struct.Struct("!6s6sH BBHHHBBHII HHHH II")
"""Ethernet, IPv4 and UDP headers, then flow and number."""
_IPV4: Final = 0x0800
_PORT: Final = 5000


def numbered(to: bytes, sender: bytes, flow: int, number: int, size: int = 0) -> bytes:
    """A frame of `size` bytes, or as many as it needs."""
    length = max(size, _FRAME.size) - 14
    head = _FRAME.pack(
        to,
        sender,
        _IPV4,
        *(0x45, 0, length, 0, 0, 64, 17, 0, 0x0A000001, 0x0A000001),
        *(_PORT + flow, _PORT, length - 20, 0),
        flow,
        number,
    )
    return head.ljust(size, b"\xee")


def flow_and_number(frame: bytes) -> tuple[int, int] | None:
    """What `numbered` has put in; None for any other frame."""
    if len(frame) < _FRAME.size or frame[12:14] != b"\x08\x00" or frame[23] != 17:
        return None
    fields = _FRAME.unpack_from(frame)
    return fields[-2], fields[-1]


class News:
    """Something that changes, and can be waited for."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return once it holds; fails if it does not for long."""
        with trio.move_on_after(LONG):
            while not condition():
                await self._changed.wait()
            return
        raise AssertionError(f"not within {LONG:g} s: {what}")


class Network(abc.ABC):
    """A host that guests talk to, and what has come there."""

    def __init__(self) -> None:
        self.news = News()
        self.got: dict[int, list[int]] = defaultdict(list)
        """The numbers of what came, by flow."""
        self.sent: dict[int, int] = defaultdict(int)
        """The next number of what goes to a guest, by flow."""
        self.others: list[bytes] = []
        """Frames that are neither numbered nor an announcement."""
        self.announced: list[str] = []
        """The servers from which announcements came, in that order."""
        self.where: dict[bytes, str] = {}
        """The server behind which an address is."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Take in frames until cancelled."""

    @abc.abstractmethod
    async def send(self, to: bytes, frame: bytes) -> None:
        """Send to where `to` is, or nowhere; waits while the wire is full."""

    def take(self, frame: bytes, server: str) -> None:
        """A frame has come from the network of `server`."""
        self.where[frame[6:12]] = server
        if frame[12:14] == RARP:
            assert frame[:6] == BROADCAST
            self.announced.append(server)
        elif (found := flow_and_number(frame)) is not None:
            self.got[found[0]].append(found[1])
        else:
            self.others.append(frame)

    def is_behind(self, address: bytes, server: str) -> bool:
        """Whether `address` was last heard of from `server`."""
        return self.where.get(address) == server

    async def send_numbered(self, to: bytes, flow: int, size: int = 0) -> int:
        """Send the next frame of `flow` to a guest; its number."""
        number = self.sent[flow]
        self.sent[flow] += 1
        await self.send(to, numbered(to, MAC_HOST, flow, number, size))
        return number


class Host(Network):
    """The host in `folder`; the uplink called x is at the socket x.net there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.address = str(folder / "host.net")
        self._folder = folder
        self._closers = contextlib.ExitStack()
        self._socket = self._closers.enter_context(_datagram_socket())
        self._socket.bind(self.address)
        self._wires: dict[str, socket.socket] = {}
        self._sending = trio.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closers.close()

    def address_of(self, server: str) -> str:
        """Where the uplink of `server` has to be."""
        return str(self._folder / f"{server}.net")

    async def run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, address = self._socket.recvfrom(1 << 17)
                    self.take(frame, Path(address).stem)
            self.news.tell()

    async def send(self, to: bytes, frame: bytes) -> None:
        server = self.where.get(to)
        if server is None:
            await trio.lowlevel.checkpoint()
            return
        wire = self._wires.get(server)
        if wire is None:
            wire = self._wires[server] = self._closers.enter_context(_datagram_socket())
            wire.connect(self.address_of(server))
        async with self._sending:
            while True:
                await trio.lowlevel.wait_writable(wire)
                with contextlib.suppress(BlockingIOError):
                    wire.send(frame)
                    return


@contextlib.contextmanager
def _datagram_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        yield made
