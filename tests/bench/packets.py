"""What a packet costs the server: processor time of one member, wired to a TAP device.

A driver in this process makes 128 packets of 100 bytes available at once, or has a packet socket
put them into the TAP device; then one pass of the member, or of the uplink, moves them, and is
timed.  Processor time of this thread, system calls included, so others on the machine disturb it
less than anything else here.  Single packets, which is what a ping is, cost a pass each.

The peer is the system call alone, writev or readv, on the same TAP device.
"""

from __future__ import annotations

import os
import time
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Final

import trio

from tests.bench.figures import NATIVE, Better, Figure
from tests.testbed.bed import Bed
from tests.testbed.netns import open_netns
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.software.ports import HEAD_SIZE
from vfio_user_virtio.backends.software.uplinks.tap import TapUplink
from vfio_user_virtio.backends.software.uplinks.tun_device import tap_from_fd
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.split_queue import F_WRITE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.backends.software.ports import Buffer
    from vfio_user_virtio.testing.driver_queue import Ring

SYSTEM_CALL: Final = "system call"
BATCH: Final = 128
SIZE: Final = 100
RX, TX = 0, 1
RX_BUFFER: Final = 1536
HEADER: Final = bytes(12)
MAC: Final = bytes.fromhex("020000000001")
PEER_MAC: Final = bytes.fromhex("020000000099")
ETHERTYPE: Final = b"\x88\xb5"  # for local experiments (IEEE 802): nobody answers
LARGEST: Final = 44
"""Buffers that `readv` is given: what the largest frame needs."""


class Pair:
    """RX and TX queues of a running member, and both ends of its TAP device."""

    def __init__(
        self, member: Member, rx: Ring, tx: Ring, uplink: TapUplink, tap: int, wire: socket.socket
    ) -> None:
        self.member = member
        self.uplink = uplink
        self.tap = tap
        self.wire = wire
        self.rx = rx
        self.tx = tx
        payload = bytes(SIZE)
        self.inbound = MAC + PEER_MAC + ETHERTYPE + payload
        self.outbound = HEADER + PEER_MAC + MAC + ETHERTYPE + payload
        for index in range(tx.size):
            buffer = tx.ram.allocate(len(self.outbound))
            buffer.memory[:] = self.outbound
            tx.set_descriptor(index, buffer.iova, buffer.size)
            tx.set_avail(index, index)
        for index in range(rx.size):
            rx.set_descriptor(index, rx.ram.allocate(RX_BUFFER).iova, RX_BUFFER, F_WRITE)
            rx.set_avail(index, index)
        rx.avail_idx = rx.size
        rx.used_event = tx.used_event = 0xFFFF  # an interrupt per 65,536 packets
        member.kick(RX)
        member.work()

    def send(self, count: int) -> float:
        """Microseconds of each packet out."""
        self.tx.avail_idx = (self.tx.avail_idx + count) & 0xFFFF
        begin = time.thread_time_ns()
        self.member.kick(TX)
        self.member.work()
        taken = time.thread_time_ns() - begin
        assert self.tx.used_idx == self.tx.avail_idx
        return taken / count / 1000

    def receive(self, count: int) -> float:
        """Microseconds of each packet in."""
        for _ in range(count):
            self.wire.send(self.inbound)
        before = self.rx.used_idx
        begin = time.thread_time_ns()
        self.uplink.poll()
        taken = time.thread_time_ns() - begin
        assert (self.rx.used_idx - before) & 0xFFFF == count
        self.rx.avail_idx = (self.rx.avail_idx + count) & 0xFFFF
        return taken / count / 1000

    def write(self, count: int) -> float:
        """Microseconds of a bare writev of the same packet."""
        parts: list[Buffer] = [self.outbound[:HEAD_SIZE], memoryview(self.outbound)[HEAD_SIZE:]]
        begin = time.thread_time_ns()
        for _ in range(count):
            os.writev(self.tap, parts)
        return (time.thread_time_ns() - begin) / count / 1000

    def read(self, count: int) -> float:
        """Microseconds of a bare readv of the same packet into as many buffers."""
        for _ in range(count):
            self.wire.send(self.inbound)
        buffers = [bytearray(RX_BUFFER) for _ in range(LARGEST)]
        begin = time.thread_time_ns()
        for _ in range(count):
            os.readv(self.tap, buffers)
        return (time.thread_time_ns() - begin) / count / 1000


async def measure(effort: Effort, publish: Publish) -> None:
    async with AsyncExitStack() as stack:
        pair = await start(stack)
        contenders: dict[str, tuple[Callable[[int], float], Callable[[int], float], int]] = {
            f"TX packet of {BATCH}, CPU": (pair.send, pair.write, BATCH),
            f"RX packet of {BATCH}, CPU": (pair.receive, pair.read, BATCH),
            "TX packet alone, CPU": (pair.send, pair.write, 1),
            "RX packet alone, CPU": (pair.receive, pair.read, 1),
        }
        for name, (ours, theirs, count) in contenders.items():
            columns: dict[str, list[float]] = {NATIVE: [], SYSTEM_CALL: []}
            for _ in range(effort.batches):
                columns[NATIVE].append(ours(count))
                columns[SYSTEM_CALL].append(theirs(count))
            publish(Figure(name, "µs", Better.LESS, columns, SYSTEM_CALL))


async def start(stack: AsyncExitStack) -> Pair:
    """A member on a TAP device of its own namespace, its driver up, its queues empty."""
    netns = await stack.enter_async_context(open_netns(Bed.find()))
    await netns.disable_ipv6()
    await netns.add_tap("tap0")
    tap = await netns.open_tap("tap0")
    wire = stack.enter_context(closing(await netns.open_packet_socket("tap0")))
    owner = Owner("owner")
    uplink = TapUplink(owner.switch, tap_from_fd(tap))
    stack.callback(uplink.close)
    owner.add_uplink(uplink)
    member = owner.add_member(MemberConfig(mac=MAC))
    nursery = await stack.enter_async_context(trio.open_nursery())
    stack.callback(nursery.cancel_scope.cancel)
    nursery.start_soon(owner.run)
    ram = stack.enter_context(GuestRam())
    client = await stack.enter_async_context(served(member, memory=ram))
    await ram.map(client)
    driver = NetDriver(await VirtioPci.open(client), ram)
    await driver.start(rx=False)
    await driver.control.set_rx_mode("promisc", False)
    return Pair(member, driver.queue(RX).ring, driver.queue(TX).ring, uplink, tap, wire)
