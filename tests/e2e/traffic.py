"""Traffic between a guest and its test, and the checks that several tests make with it.

The guest's NIC and the TAP device share one small network.  Amounts are bytes, not seconds: what
is asserted is that data arrives, whole, and not how fast.
"""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

HOST: Final = "10.0.0.1"
GUEST: Final = "10.0.0.2"
HOST_MAC: Final = "52:54:00:00:00:01"
MAC: Final = "52:54:00:00:00:02"
TAP: Final = "tap0"
PROGRAMS: Final = ("ip", "ethtool", "iperf3")
PORT: Final = 5000

ETH_P_TEST: Final = 0x88B5
"""IEEE 802 local experimental EtherType 1: nothing answers it."""
ETH_P_8021Q: Final = 0x8100


async def add_tap(netns: Netns, mtu: int = 1500) -> None:
    """The test's end of the network."""
    await netns.add_tap(TAP, f"{HOST}/24", mtu)
    await netns.run("ip", "link", "set", TAP, "address", HOST_MAC)


async def configure(guest: Guest, device: str = "eth0", address: str = GUEST) -> None:
    """The guest's end of the network."""
    await guest.run(f"ip address add {address}/24 dev {device} && ip link set {device} up")


async def check_ping(guest: Guest, netns: Netns) -> None:
    """Both ways, small and in fragments."""
    for size in (56, 8000):
        await guest.run(f"ping -c 2 -i 0.2 -W 5 -s {size} {HOST}")
        await netns.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "-s", str(size), GUEST)


async def check_tcp(
    guest: Guest, netns: Netns, *, host: str = HOST, mebibytes: int = 16, streams: int = 1
) -> None:
    """iperf3 from the guest, then to it; every byte is acknowledged."""
    wanted = mebibytes << 20
    async with netns.running("iperf3", "-s", "--forceflush", ready="Server listening"):
        for direction in ("", "-R"):
            command = f"iperf3 -c {host} -n {mebibytes}M -P {streams} -J {direction}"
            report = json.loads(await guest.run(command, 60))
            assert "error" not in report, report
            got = report["end"]["sum_received"]["bytes"]
            assert got >= wanted * 0.9, f"{direction or 'out'}: {got} of {wanted} bytes arrived"


async def check_udp(guest: Guest, netns: Netns) -> None:
    """Small packets at a rate that an emulated guest can take."""
    async with netns.running("iperf3", "-s", "--forceflush", ready="Server listening"):
        command = f"iperf3 -c {HOST} -u -b 10M -l 200 -t 1 -J"
        report = json.loads(await guest.run(command))
        total = report["end"]["sum"]
        assert total["lost_packets"] < total["packets"] / 10, total


async def check_integrity(guest: Guest, netns: Netns, mebibytes: int = 8) -> None:
    """The same bytes arrive: checksums are offloaded, so that TCP itself would not notice."""
    size = mebibytes << 20
    await guest.run(f"head -c {size} /dev/urandom >/tmp/data")
    sent = (await guest.run("sha256sum </tmp/data")).split()[0]
    received = bytearray()
    async with await netns.listen(PORT) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.run, f"nc {HOST} {PORT} </tmp/data", 60)
            async with await listener.accept() as stream:
                async for data in stream:
                    received += data
                    if len(received) == size:
                        break
        assert hashlib.sha256(received).hexdigest() == sent, "from the guest"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.run, f"nc {HOST} {PORT} </dev/null >/tmp/back", 60)
            async with await listener.accept() as stream:
                await stream.send_all(received)
    assert (await guest.run("sha256sum </tmp/back")).split()[0] == sent, "to the guest"


async def counter(guest: Guest, name: str, device: str = "eth0") -> int:
    """A statistic of the guest's device."""
    return int(await guest.run(f"cat /sys/class/net/{device}/statistics/{name}"))


class FrameProbe:
    """Counts which frames get to the guest's driver.

    Frames go into the TAP device; a ping after them, on the same queue, tells that they have
    passed.  Static neighbours on both ends keep ARP away, so that the guest's counter of received
    packets is exact; the namespace is without IPv6 for the same reason.
    """

    def __init__(self, guest: Guest, netns: Netns, wire: socket.socket) -> None:
        self._guest = guest
        self._netns = netns
        self._wire = wire

    @classmethod
    @asynccontextmanager
    async def open(cls, guest: Guest, netns: Netns) -> AsyncIterator[FrameProbe]:
        with await netns.open_packet_socket(TAP) as wire:
            yield cls(guest, netns, wire)

    async def arrivals(
        self, destination: str, *, vlan: int | None = None, reached_at: str = MAC
    ) -> int:
        """How many of eight frames to a MAC address, tagged or not, the guest's driver gets.

        `reached_at` is the address that the guest itself is known to have.
        """
        await self._guest.run(f"ip neigh replace {HOST} lladdr {HOST_MAC} dev eth0")
        await self._netns.run("ip", "neigh", "replace", GUEST, "lladdr", reached_at, "dev", TAP)
        tag = b"" if vlan is None else struct.pack("!HH", ETH_P_8021Q, vlan)
        frame = address(destination) + address("02:00:00:00:00:99") + tag
        frame += struct.pack("!H", ETH_P_TEST) + bytes(46)
        before = await counter(self._guest, "rx_packets")
        for _ in range(8):
            self._wire.send(frame)
        await self._netns.run("ping", "-c", "1", "-W", "5", GUEST)
        return await counter(self._guest, "rx_packets") - before - 1


def address(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
