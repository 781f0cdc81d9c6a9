"""The whole product once, live: ``make demo``.

The real server is started in a network namespace with a TAP device, a guest boots on the device
that it serves, and packets go both ways.  What is told comes from where it happens: the server's
log, QEMU's trace events, the guest's /sys and /proc, and the frames that the kernel shows at the
TAP device.  The exit code is 0 only if every ping was answered, by both ends' own count and by the
frames on the wire, so that no part of the chain is its own witness.

No root is needed where this user may make user namespaces.  The guest is emulated (TCG), so that
it goes the same everywhere.  Ctrl-C ends everything that was started.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from examples.account import trace
from examples.account.lines import Account, Follower, follow, server_line
from examples.account.wire import Echo, Wire
from tests.testbed.bed import Bed, TestbedMissing
from tests.testbed.guest import Guest, GuestFailed, boot
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.netns import CommandFailed, Netns, NoNamespaces, open_netns
from tests.testbed.server_process import ServerFailed, ServerProcess, serve
from vfio_user_virtio.virtio.features import feature_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TAP: Final = "tap0"
HOST: Final = "10.0.0.1"
GUEST: Final = "10.0.0.2"
MAC: Final = "52:54:00:12:34:56"
PINGS: Final = 5
DEMO_SECONDS: Final = 110
LOG_SECONDS: Final = 0.1
"""For the last lines of a log to be told before what comes next."""
DEVICE: Final = "/sys/bus/pci/devices/0000:01:00.0"
SUMMARY: Final = re.compile(r"(\d+) packets transmitted, (\d+) packets received")
ROUND_TRIP: Final = re.compile(r"round-trip min/avg/max = (\S+) ms")


class EchoesMissing(Exception):
    """Not every echo request was sent, seen, answered and the answer seen."""


class Stopped(Exception):
    """The demo was told to end."""


FAILURES: Final = (
    CommandFailed,
    EchoesMissing,
    GuestFailed,
    NoNamespaces,
    ServerFailed,
    TestbedMissing,
    trio.TooSlowError,
    OSError,
)
"""What may go wrong without a mistake in the demo itself."""


@attrs.frozen
class Pings:
    """What one end's ping says, and what was seen at the TAP device of the same echoes."""

    name: str
    sent: int
    answered: int
    round_trip: str
    requests: int
    replies: int

    @property
    def complete(self) -> bool:
        return self.sent == self.answered == self.requests == self.replies == PINGS

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.sent} sent, {self.answered} answered "
            f"(min/avg/max {self.round_trip} ms); "
            f"seen at {TAP}: {self.requests} requests, {self.replies} replies"
        )


async def demonstrate(account: Account, folder: Path) -> list[Pings]:
    """The demo; the pings, which are complete.  Raises one of `FAILURES`."""
    bed = Bed.find()
    account.tell("bed", bed.describe())
    log = Follower(folder / "server.log", server_line(account))
    events = Follower(folder / "guest/qemu.log", trace.Trace(account).take)
    async with trio.open_nursery() as nursery, open_netns(bed) as netns:
        nursery.start_soon(follow, log, events)
        await netns.disable_ipv6()
        await netns.add_tap(TAP, f"{HOST}/24")
        account.tell("host", f"a network namespace of its own, with {TAP} at {HOST}/24")
        async with serving(account, folder, netns) as server:
            async with booting(account, folder, bed) as guest:
                await tell_driver(account, guest)
                pings = await ping_both_ways(account, guest, netns)
                if complaints := await guest.kernel_complaints():
                    raise GuestFailed("the guest's kernel complains: " + "; ".join(complaints))
            account.tell("qemu", "has ended")
            await trio.sleep(LOG_SECONDS)
            if code := await server.stop():
                raise ServerFailed(f"the server ended with {code}; see {server.log}")
        log.catch_up()
        account.tell("server", "has ended")
        nursery.cancel_scope.cancel()
    return pings


@asynccontextmanager
async def serving(account: Account, folder: Path, netns: Netns) -> AsyncIterator[ServerProcess]:
    """The server, on the TAP device."""
    options = ("--socket-path", str(folder / "vm.sock"), "--mac", MAC, "--uplink", f"tap:{TAP}")
    account.tell("server", f"$ vfio-user-virtio serve {' '.join(options)}")
    async with serve(folder, *options, wrap=netns.wrap) as server:
        await trio.sleep(LOG_SECONDS)
        yield server


@asynccontextmanager
async def booting(account: Account, folder: Path, bed: Bed) -> AsyncIterator[Guest]:
    """A guest on the server's device, whose QEMU writes trace events."""
    device = vfio_user_pci(folder / "vm.sock")
    account.tell("qemu", f"$ qemu-system-x86_64 … -device '{device[-1]}'")
    machine = Machine(devices=(*device, *trace.ARGUMENTS), programs=("ip",))
    async with boot(bed, machine, folder / "guest") as guest:
        yield guest


async def tell_driver(account: Account, guest: Guest) -> None:
    """What the guest sees of the device, and what its driver made of it."""
    kernel = (await guest.run("uname -r")).strip()
    account.tell("guest", f"Linux {kernel} is up")
    vendor, device = (await guest.run(f"cat {DEVICE}/vendor {DEVICE}/device")).split()
    driver = (await guest.run(f"basename $(readlink {DEVICE}/virtio*/driver)")).strip()
    account.tell("guest", f"PCI function {vendor[2:]}:{device[2:]} is bound to {driver}")
    bits = (await guest.run(f"cat {DEVICE}/virtio*/features")).strip()
    account.tell("guest", "negotiated " + ", ".join(feature_names(int(bits[::-1], 2))))
    await guest.run(f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up")
    address, carrier = (await guest.run("cd /sys/class/net/eth0; cat address carrier")).split()
    if carrier != "1":
        raise GuestFailed(f"eth0 has no carrier; see {guest.log.parent}")
    account.tell("guest", f"eth0 has address {address} and {GUEST}/24; link up")
    if address != MAC:
        raise GuestFailed(f"eth0 has address {address}, the server was told {MAC}")


async def ping_both_ways(account: Account, guest: Guest, netns: Netns) -> list[Pings]:
    """Echoes from the guest, then to it, with the frames at the TAP device told.

    Raises `EchoesMissing`.
    """

    def tell(reply: Echo) -> None:
        way = f"{GUEST} → {HOST}" if reply.destination == MAC else f"{HOST} → {GUEST}"
        account.tell("wire", f"{way}  echo {reply.sequence}: request and reply seen at {TAP}")

    wire = Wire(await netns.open_packet_socket(TAP), tell)
    interfaces = await netns.run("ip", "-brief", "link", "show", "dev", TAP)
    host_mac = interfaces.split()[2]
    count = ("-c", str(PINGS), "-i", "0.2", "-W", "5")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.run)
        output = (await guest.execute(f"ping {' '.join(count)} {HOST}")).output
        await trio.sleep(LOG_SECONDS)
        outward = judge("guest → host", output, wire, MAC)
        if not outward.complete:
            raise EchoesMissing(str(outward))
        neighbours = (await netns.run("ip", "neigh", "show", "dev", TAP)).split()
        account.tell("host", f"has learnt that {neighbours[0]} is at {neighbours[2]}")
        output = await netns.run("ping", *count, GUEST)
        await trio.sleep(LOG_SECONDS)
        inward = judge("host → guest", output, wire, host_mac)
        if not inward.complete:
            raise EchoesMissing(str(inward))
        nursery.cancel_scope.cancel()
    await tell_counts(account, guest)
    return [outward, inward]


async def tell_counts(account: Account, guest: Guest) -> None:
    """What the guest's kernel counted."""
    statistics = "cd /sys/class/net/eth0/statistics; cat tx_packets rx_packets"
    sent, received = (await guest.run(statistics)).split()
    vectors = (await guest.run("grep PCI-MSIX.*virtio0 /proc/interrupts")).splitlines()
    interrupts = sum(int(vector.split()[1]) for vector in vectors)
    account.tell(
        "guest",
        f"eth0 has sent {sent} packets and received {received}; "
        f"{interrupts} interrupts on {len(vectors)} vectors",
    )


def judge(name: str, output: str, wire: Wire, sender: str) -> Pings:
    """Reads ping's own summary, and sets the frames on the wire beside it."""
    summary = SUMMARY.search(output)
    sent, answered = map(int, summary.groups()) if summary else (0, 0)
    times = ROUND_TRIP.search(output)
    round_trip = times[1] if times else "-"
    return Pings(name, sent, answered, round_trip, wire.requests[sender], wire.replies[sender])


async def until_stopped(account: Account, folder: Path) -> list[Pings]:
    """The demo, with a limit of time, and with SIGTERM and SIGHUP as good as Ctrl-C."""

    async def stop() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                raise Stopped

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop)
        with trio.fail_after(DEMO_SECONDS):
            pings = await demonstrate(account, folder)
        nursery.cancel_scope.cancel()
    return pings


def reasons(group: BaseExceptionGroup[BaseException]) -> list[str]:
    """The messages of all exceptions in a group."""
    found: list[str] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found += reasons(error)
        elif isinstance(error, trio.TooSlowError):
            found.append(f"it took more than {DEMO_SECONDS} s")
        elif isinstance(error, NoNamespaces):
            found.append(f"{error}; allow user namespaces and /dev/net/tun, or run it as root")
        else:
            found.append(str(error))
    return found


def run(account: Account, folder: Path) -> int:
    """The demo with its verdict; the exit code."""
    pings: list[Pings] = []
    failed: list[str] = []
    stopped = False
    try:
        pings = trio.run(until_stopped, account, folder)
    except* (KeyboardInterrupt, Stopped):
        stopped = True
    except* FAILURES as failures:
        failed = reasons(failures)
    account.gap()
    if stopped:
        account.verdict("Stopped; all that was started has ended.", good=False)
        return 130  # as a shell has it for SIGINT
    for reason in failed:
        account.verdict(f"Failed: {reason}", good=False)
    if failed:
        if any(folder.iterdir()):
            logs = "The logs of the server, QEMU and the guest are in"
            account.verdict(f"{logs} {folder}", good=False)
        return 1
    for ping in pings:
        account.verdict(str(ping), good=True)
    account.verdict("Packets flow both ways.", good=True)
    return 0


def main() -> int:
    account = Account()
    account.title("A guest's packets through a virtio-net device that this project serves.")
    folder = Path(tempfile.mkdtemp(prefix="vfio-user-virtio-demo-"))
    code = run(account, folder)
    if code != 1 or not any(folder.iterdir()):
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
