"""What a guest that is moved has in its memory, and checks itself.

A load keeps writing memory, which QEMU sees and has to send again and again; each file is read and
checked long after it was written, so that some are read on the other side of a move.

`Late` are frames that come when the guest has stopped already: the device writes them to memory
that QEMU has sent, and so the guest meets them at the target only if QEMU is told of it.  They are
echo requests, with a checksum that the guest verifies; TCP would send again what is lost.
"""

from __future__ import annotations

import json
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from tests.e2e import traffic
from vfio_user_virtio.virtio.checksum import ipv4_checksum, words_sum
from vfio_user_virtio_server.vm import move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

    from tests.e2e.moving import End, Nic
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

FILES: Final = 2
FILE_SIZE: Final = 1 << 19
LATE: Final = 8
"""Frames, of as many pages."""

_ECHO: Final = struct.Struct("!BBHHH")
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_ETHERNET: Final = 14
_REQUEST: Final = 8
_ICMP: Final = 1


async def start_load(guest: Guest) -> None:
    """Have `guest` write files, in turn, always anew; each is checked before that."""
    await guest.run(
        "mkdir /tmp/load && cd /tmp/load\n"
        f"fill() {{ head -c {FILE_SIZE} /dev/urandom | tee $1 | md5sum >$1.sum; }}\n"
        f"for one in $(seq 0 {FILES - 1}); do fill $one; done\n"
        "(n=0; while :; do\n"
        f"  one=$((n % {FILES}))\n"
        "  md5sum <$one | cmp -s - $one.sum || echo $n >>bad\n"
        "  fill $one; n=$((n + 1)); echo $n >rounds.new; mv rounds.new rounds\n"
        "  usleep 200000\n"
        "done) </dev/null >/dev/null 2>&1 &"
    )


async def check_load(guest: Guest) -> None:
    """Wait until each file has been checked once more, wherever `guest` is: none was ever bad."""
    before = int(await guest.run("until cat /tmp/load/rounds 2>/dev/null; do usleep 10000; done"))
    wanted = before + FILES + 1
    await guest.run(f"until [ $(cat /tmp/load/rounds) -ge {wanted} ]; do usleep 10000; done")
    assert await guest.run("cd /tmp/load; [ ! -e bad ] || cat bad") == "", "files it wrote"
    print(f"{wanted} checks of files")


class Late:
    """Echo requests that are answered or not; made by `open_late`."""

    def __init__(self, netns: Netns, nic: Nic, wire: trio.socket.SocketType) -> None:
        self._netns = netns
        self._nic = nic
        self._wire = wire
        self._sequence = 0

    async def answered(self) -> int:
        """Requests whose answers have come, not counting one more that is waited for."""
        await self._send()
        count = 0
        with trio.fail_after(30):
            while (got := self._decode_answer(await self._wire.recv(2048))) != self._sequence:
                count += got is not None
        return count

    async def send(self, source: End) -> None:
        """`LATE` requests, until the device at `source` has them all."""
        wanted = await self._taken(source) + LATE
        for _ in range(LATE):
            await self._send()
        with trio.fail_after(20):
            while await self._taken(source) < wanted:
                pass

    async def _taken(self, end: End) -> int:
        """Frames that the device has taken from its uplink."""
        (said,) = json.loads(await self._netns.run("ip", "-s", "-j", "link", "show", end.taps[0]))
        return int(said["stats64"]["tx"]["packets"])

    async def _send(self) -> None:
        self._sequence += 1
        payload = self._sequence.to_bytes(2, "big") * 500
        message = _ECHO.pack(_REQUEST, 0, 0, 1, self._sequence) + payload
        message = message[:2] + _checksum(message) + message[4:]
        size = _IPV4.size + len(message)
        ends = (_ipv4(self._nic.host), _ipv4(self._nic.guest))
        header = _IPV4.pack(0x45, 0, size, 0, 0, 64, _ICMP, 0, *ends)
        header = header[:10] + _checksum(header) + header[12:]
        link = traffic.address(self._nic.mac) + traffic.address(traffic.HOST_MAC) + b"\x08\x00"
        await self._wire.send(link + header + message)

    def _decode_answer(self, frame: bytes) -> int | None:
        """The number of the request that `frame` answers."""
        header, message = frame[_ETHERNET : _ETHERNET + _IPV4.size], frame[_ETHERNET + _IPV4.size :]
        if frame[12:14] != b"\x08\x00" or header[9] != _ICMP or message[0] == _REQUEST:
            return None
        return int(_ECHO.unpack_from(message)[4])


def _ipv4(text: str) -> bytes:
    return bytes(map(int, text.split(".")))


def _checksum(data: bytes) -> bytes:
    """As it is sent; `data` has zeros in its place."""
    return ipv4_checksum(words_sum(data)).to_bytes(2, "big")


@asynccontextmanager
async def open_late(netns: Netns, guest: Guest, nic: Nic) -> AsyncIterator[Late]:
    """Between the bridge and `guest`, which knows each other from here on."""
    await netns.run("ip", "link", "set", nic.bridge, "address", traffic.HOST_MAC)
    await guest.run(f"ip neigh replace {nic.host} lladdr {traffic.HOST_MAC} dev {nic.device}")
    with trio.socket.from_stdlib_socket(await netns.open_packet_socket(nic.bridge)) as wire:
        late = Late(netns, nic, wire)
        await late.answered()
        yield late


def insert_step(monkeypatch: pytest.MonkeyPatch, before: str, step: move.Step) -> None:
    """Have each move do `step` where the one that is called `before` begins."""
    names = [one.name for one in move.STEPS]
    place = names.index(before)
    monkeypatch.setattr(move, "STEPS", (*move.STEPS[:place], step, *move.STEPS[place:]))
