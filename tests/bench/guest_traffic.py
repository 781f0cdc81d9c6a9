"""A real guest's packets, through our device and through QEMU's own, in the same guest.

    iperf3 server, ping          network namespace
      tap0            tap1
        |               |        each with vnet_hdr
    vfio-user-virtio   QEMU      virtio-net-pci, in QEMU's main loop
        |               |
       eth0            eth1      one guest, one vCPU, TCG

Transfers on the two NICs alternate, pings in short blocks.  Nothing is bridged: each TAP device is
its own network, so an address chooses the NIC.

The rate of UDP into the guest has to be chosen: a TAP device pushes nothing back on its sender, so
one that sends as fast as it can takes the processors from who is to receive, and what gets through
tells of the scheduler.  So several rates are offered, and a sample is the most that arrived at any.

Where the scheduler puts the server decides much: on the processor of the vCPU that woke it, as a
kernel with two processors likes to, it takes time from the guest instead of working beside it.
With `Effort.pinned` each of the two has a processor of its own, as one has it in production.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.bench.figures import NATIVE, Better, Figure, at_least, at_most
from tests.testbed.bed import Bed
from tests.testbed.guest import boot
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.netns import open_netns
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.bench.effort import Effort
    from tests.bench.figures import Aim, Publish
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns
    from tests.testbed.server_process import ServerProcess

QEMU: Final = "QEMU"
"""The peer's column: virtio-net-pci of the QEMU that also runs the guest."""

AIM_TCP: Final = at_least(1.25, of_ratio=True)
AIM_PACKETS: Final = at_least(1.3, of_ratio=True)
AIM_PING: Final = at_most(1.1, of_ratio=True)
AIM_WAKE_UPS: Final = at_most(0)

UDP_SIZE: Final = 100
UDP_IN_RATES: Final = (30_000, 40_000, 50_000)
"""Packets per second."""

PING_INTERVAL: Final = 0.05
SETTLE_SECONDS: Final = 2
GRACE_SECONDS: Final = 10
ATTEMPTS: Final = 3
"""iperf3's control connection shares the network with a flood, and may not survive it."""

SUBNETS: Final = {NATIVE: 0, QEMU: 1}
MACS: Final = {NATIVE: "52:54:00:00:00:0a", QEMU: "52:54:00:00:00:0b"}


class TransferFailed(Exception):
    """iperf3 did not measure."""


@attrs.frozen
class Wire:
    """A guest and the namespace, between which traffic is measured."""

    guest: Guest
    netns: Netns

    async def iperf(
        self, column: str, arguments: str, seconds: int, attempts: int = ATTEMPTS
    ) -> dict[str, float]:
        """The receiver's sums of one transfer between the guest and the namespace.

        Raises TransferFailed.
        """
        command = f"iperf3 -J -c {host(column)} -t {seconds} {arguments}"
        output = ""
        for _ in range(attempts):
            output = (await self.guest.execute(command, seconds + GRACE_SECONDS)).output
            try:
                report = json.loads(output)
            except ValueError:
                continue
            if "error" not in report:
                end: dict[str, dict[str, float]] = report["end"]
                return end.get("sum_received") or end["sum"]
        raise TransferFailed(f"`{command}` failed {attempts} times; the last time:\n{output}")

    async def tcp(self, column: str, seconds: int, arguments: str = "") -> float:
        """Megabits per second that arrived."""
        return (await self.iperf(column, arguments, seconds))["bits_per_second"] / 1e6

    async def udp_out(self, column: str, seconds: int) -> float:
        """Packets per second that arrived."""
        return packet_rate(await self.iperf(column, f"-u -l {UDP_SIZE} -b 0", seconds))

    async def udp_in(self, column: str, seconds: int) -> float:
        """The same, at the best of the offered rates; one that drowns iperf3 counts for nothing."""
        found = [0.0]
        for rate in UDP_IN_RATES:
            arguments = f"-u -l {UDP_SIZE} -b {rate * UDP_SIZE * 8} -R"
            with contextlib.suppress(TransferFailed):
                found.append(packet_rate(await self.iperf(column, arguments, seconds, 1)))
        return max(found)

    async def ping_out(self, column: str, count: int) -> float:
        """Microseconds from the guest to the namespace and back, the median."""
        command = f"ping -c {count + 1} -i {PING_INTERVAL} {host(column)}"
        return median_ping(await self.guest.run(command, count * PING_INTERVAL + 20))

    async def ping_in(self, column: str, count: int) -> float:
        arguments = ("-c", str(count + 1), "-i", str(PING_INTERVAL))
        return median_ping(await self.netns.run("ping", *arguments, address(column)))


@attrs.frozen
class Bench(Wire):
    """The guest with its two NICs, both up."""

    server: ServerProcess


@attrs.frozen
class Kind:
    """A kind of traffic; `sample` runs it once, on one NIC."""

    name: str
    unit: str
    better: Better
    aim: Aim
    sample: Callable[[Bench, str, Effort], Awaitable[float]]


KINDS: Final = (
    Kind(
        *("ping from the guest", "µs", Better.LESS, AIM_PING),
        lambda bench, column, effort: bench.ping_out(column, effort.pings),
    ),
    Kind(
        *("ping to the guest", "µs", Better.LESS, AIM_PING),
        lambda bench, column, effort: bench.ping_in(column, effort.pings),
    ),
    Kind(
        *("TCP out", "Mbit/s", Better.MORE, AIM_TCP),
        lambda bench, column, effort: bench.tcp(column, effort.seconds),
    ),
    Kind(
        *("TCP in", "Mbit/s", Better.MORE, AIM_TCP),
        lambda bench, column, effort: bench.tcp(column, effort.seconds, "-R"),
    ),
    Kind(
        *("TCP out, MSS 536", "Mbit/s", Better.MORE, AIM_PACKETS),
        lambda bench, column, effort: bench.tcp(column, effort.seconds, "-M 536"),
    ),
    Kind(
        *(f"UDP out, {UDP_SIZE} B", "packets/s", Better.MORE, AIM_PACKETS),
        lambda bench, column, effort: bench.udp_out(column, effort.seconds),
    ),
    Kind(
        *(f"UDP in, {UDP_SIZE} B", "packets/s", Better.MORE, AIM_PACKETS),
        lambda bench, column, effort: bench.udp_in(column, effort.seconds),
    ),
)


def host(column: str) -> str:
    return f"10.0.{SUBNETS[column]}.1"


def address(column: str) -> str:
    return f"10.0.{SUBNETS[column]}.2"


def packet_rate(sums: dict[str, float]) -> float:
    return (sums["packets"] - sums["lost_packets"]) / sums["seconds"]


def median_ping(output: str) -> float:
    """Microseconds, without the first one, which may have waited for ARP."""
    times = [float(ms) * 1000 for ms in re.findall(r"time=([\d.]+) ms", output)]
    return statistics.median(times[1:])


async def measure(effort: Effort, publish: Publish) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = await start(stack, folder)
        if effort.pinned:
            pin(bench)
        publish(await idle(bench, effort.idle_seconds))
        server = bench.netns.running("iperf3", "-s", "--forceflush", ready="Server listening")
        await stack.enter_async_context(server)
        for kind in KINDS:
            columns: dict[str, list[float]] = {NATIVE: [], QEMU: []}
            for _ in range(effort.pairs):
                for column, samples in columns.items():
                    samples.append(await kind.sample(bench, column, effort))
            publish(Figure(kind.name, kind.unit, kind.better, columns, QEMU, kind.aim))


async def start(stack: AsyncExitStack, folder: Path) -> Bench:
    """The namespace, the server, the guest."""
    bed = Bed.find()
    netns = await stack.enter_async_context(open_netns(bed))
    await netns.disable_ipv6()
    for column in SUBNETS:
        await netns.add_tap(f"tap{SUBNETS[column]}", f"{host(column)}/24")
    path = folder / "vf.sock"
    options = ("--socket-path", str(path), "--mac", MACS[NATIVE], "--uplink", "tap:tap0")
    server = await stack.enter_async_context(serve(folder, *options, wrap=netns.wrap))
    peer = (
        *("-netdev", "tap,id=peer,ifname=tap1,script=no,downscript=no"),
        *("-device", "pcie-root-port,id=port2,slot=2,chassis=2"),
        *("-device", f"virtio-net-pci,netdev=peer,bus=port2,mac={MACS[QEMU]}"),
    )
    machine = Machine(devices=(*vfio_user_pci(path), *peer), programs=("ip", "iperf3"))
    guest = await stack.enter_async_context(boot(bed, machine, folder, netns.wrap))
    await guest.run("echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    for column, mac in MACS.items():
        found = await guest.run(f"grep -l {mac} /sys/class/net/*/address")
        device = found.split("/")[4]
        await guest.run(
            f"echo 1 >/proc/sys/net/ipv6/conf/{device}/disable_ipv6 && "
            f"ip address add {address(column)}/24 dev {device} && ip link set {device} up"
        )
    return Bench(guest, netns, server)


def pin(bench: Bench) -> None:
    """The vCPU on the first processor that we may use, the server on the last, others anywhere."""
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(bench.server.process.pid, processors[-1:])
    for thread in Path(f"/proc/{bench.guest.process.pid}/task").iterdir():
        if (thread / "comm").read_text().startswith("CPU "):
            os.sched_setaffinity(int(thread.name), processors[:1])


async def idle(bench: Bench, seconds: float) -> Figure:
    """Wake-ups of the server while its guest, up and configured, has nothing to say."""
    await trio.sleep(SETTLE_SECONDS)
    status = Path(f"/proc/{bench.server.process.pid}/status")
    before = wake_ups(status)
    await trio.sleep(seconds)
    columns = {NATIVE: [wake_ups(status) - before]}
    name = f"idle wake-ups in {seconds:g} s, guest up"
    return Figure(name, "", Better.LESS, columns, aim=AIM_WAKE_UPS)


def wake_ups(status: Path) -> float:
    (count,) = re.findall(r"^voluntary_ctxt_switches:\s*(\d+)$", status.read_text(), re.MULTILINE)
    return float(count)
