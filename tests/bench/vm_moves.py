"""A Linux guest goes to another QEMU: with our device, and with QEMU's own, by QEMU alone.

    iperf3 server, ping        network namespace
      br0          br1         bridges, on which both places of a guest have a TAP device each
       |            |
    server x 2   QEMU x 2      one guest each, the same but for the NIC; TCG, one vCPU
       |            |
     guest        guest

The guests move in turns, once with nothing to do and once while a stream comes in, at a rate that
leaves time for the migration: it is what makes the device write to memory that QEMU has sent
already.  Before the first moves and after each pair of them, transfers and pings are measured; what
moves leave behind is the quotient of the two, and the peer's, which was moved as often.

Ours is `vm.move`, in this process; its time is that of all its steps.  The peer is ``migrate`` over
the same kind of socket, from the first command to the event that says that the target runs.
"""

from __future__ import annotations

import operator
import socket
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from tests.bench import guest_traffic
from tests.bench.figures import NATIVE, Better, Figure, at_least, at_most
from tests.bench.guest_traffic import QEMU, Wire
from tests.e2e import moving, traffic
from tests.testbed.bed import Bed
from tests.testbed.guest import boot, start
from tests.testbed.machine import Machine
from tests.testbed.netns import open_netns
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.vm.qmp import open_qmp
from vfio_user_virtio_server.vm.together import both

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

AIM_ADDED: Final = at_most(10)
AIM_TOTAL: Final = at_most(1.05, of_ratio=True)
AIM_RATE: Final = at_least(0.95, of_ratio=True)
AIM_PING: Final = at_most(1.05, of_ratio=True)

IDLE: Final = "idle"
BUSY: Final = "TCP in"
STREAM: Final = "-R -b 200M"
"""What comes in while a guest moves."""
STREAM_SECONDS: Final = 60
PORT: Final = 5202
PAUSE: Final = 1
"""Seconds before a move, for QEMU and the stream to have begun."""
READY: Final = "Server listening"
MACHINE: Final = Machine(programs=("ip", "iperf3"), memory_mib=256)


@attrs.frozen
class Moved:
    """Milliseconds; pages that the device had written, and how long it took to mark them."""

    downtime: float
    total: float
    pages: int = 0
    marking: float = 0


class Contender(Protocol):
    """A guest that can be moved; `column` is its own."""

    column: str

    @property
    def guest(self) -> Guest: ...

    async def prepare(self) -> None:
        """Start the QEMU that it is moved to next."""

    async def move(self) -> Moved: ...


class Ours:
    def __init__(self, mover: moving.Mover, here: moving.End) -> None:
        self.column = NATIVE
        self._mover = mover
        self._here = self._there = here

    @property
    def guest(self) -> Guest:
        return self._here.guest

    async def prepare(self) -> None:
        self._there = await self._mover.end(incoming=True)

    async def move(self) -> Moved:
        moved = await moving.move(self._here, self._there, lambda _: None)
        self._here = self._there
        phases = {phase.name: phase for phase in moved.phases}
        downtime = moved.downtime
        assert downtime is not None
        return Moved(
            1000 * downtime,
            1000 * (phases["run"].end - phases["check"].start),
            phases["mark pages"].page_count,
            1000 * phases["mark pages"].seconds,
        )


@attrs.define
class Place:
    guest: Guest
    qmp: Path


class Peer:
    """QEMU's own virtio-net-pci."""

    def __init__(self, bed: Bed, netns: Netns, folder: Path, stack: AsyncExitStack) -> None:
        self.column = QEMU
        self._bed = bed
        self._netns = netns
        self._folder = folder
        self._stack = stack
        self._places: list[Place] = []
        self._count = 0

    @property
    def guest(self) -> Guest:
        return self._places[0].guest

    async def boot(self) -> None:
        await self._start(incoming=False)
        await traffic.configure(self.guest, address=guest_traffic.address(QEMU))

    async def prepare(self) -> None:
        await self._start(incoming=True)

    async def _start(self, *, incoming: bool) -> None:
        self._count += 1
        tap = f"peer{self._count}"
        folder = self._folder / tap
        await self._netns.add_tap(tap)
        await self._netns.run("ip", "link", "set", tap, "master", "br1")
        qmp = folder / "qmp"
        devices = (
            *("-netdev", f"tap,id=peer,ifname={tap},script=no,downscript=no"),
            *("-device", "pcie-root-port,id=port1,slot=1,chassis=1"),
            *("-device", f"virtio-net-pci,netdev=peer,bus=port1,mac={guest_traffic.MACS[QEMU]}"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *(("-incoming", "defer") if incoming else ()),
        )
        machine = attrs.evolve(MACHINE, devices=devices)
        begin = start if incoming else boot
        guest = await self._stack.enter_async_context(
            begin(self._bed, machine, folder, self._netns.wrap)
        )
        self._places.append(Place(guest, qmp))

    async def move(self) -> Moved:
        here, there = self._places
        async with (
            open_qmp(await dial(str(here.qmp)), "source") as source,
            open_qmp(await dial(str(there.qmp)), "target") as target,
        ):
            begun = trio.current_time()
            ends = socket.socketpair()
            for qmp, end in zip((source, target), ends, strict=True):
                with end:
                    await qmp.execute("getfd", fds=[end.fileno()], fdname="channel")
            await target.execute("migrate-incoming", uri="fd:channel")
            await source.execute("migrate", uri="fd:channel")
            stopped = await source.wait_event(lambda event: event.name == "STOP")
            resumed = await target.wait_event(lambda event: event.name == "RESUME")
            total = trio.current_time() - begun
        await here.guest.quit()
        self._places = [there]
        return Moved(1000 * (resumed.seconds - stopped.seconds), 1000 * total)


@attrs.frozen
class Rates:
    """Of one guest, where it is: Mbit/s and microseconds."""

    tcp_out: float
    tcp_in: float
    ping: float


async def measure(effort: Effort, publish: Publish) -> None:
    moves: dict[tuple[str, str], list[Moved]] = {}
    rates: dict[str, list[Rates]] = {NATIVE: [], QEMU: []}
    async with open_contenders() as (netns, contenders):
        for number in range(effort.guest_moves + 1):
            for contender in contenders:
                rates[contender.column].append(await measure_rates(contender, netns, effort))
            for load in (IDLE, BUSY) if number < effort.guest_moves else ():
                for contender in contenders:
                    moved = await move(contender, netns, load)
                    moves.setdefault((load, contender.column), []).append(moved)
    for load in (IDLE, BUSY):
        publish_moves(load, moves[load, NATIVE], moves[load, QEMU], publish)
    publish_rates(rates, publish)


@asynccontextmanager
async def open_contenders() -> AsyncIterator[tuple[Netns, tuple[Contender, Contender]]]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bed = Bed.find()
        netns = await stack.enter_async_context(open_netns(bed))
        mover = await stack.enter_async_context(
            moving.open_mover(bed, netns, folder, machine=MACHINE)
        )
        await moving.add_bridge(netns, "br1", guest_traffic.host(QEMU), "52:54:00:00:01:01")
        server = netns.running("iperf3", "-s", "--forceflush", ready=READY)
        await stack.enter_async_context(server)
        peer = Peer(bed, netns, folder, stack)
        end, _ = await both(lambda: mover.end(incoming=False), peer.boot)
        ours = Ours(mover, end)
        yield netns, (ours, peer)


async def move(contender: Contender, netns: Netns, load: str) -> Moved:
    await contender.prepare()
    if load == IDLE:
        await trio.sleep(PAUSE)
        return await contender.move()
    host = guest_traffic.host(contender.column)
    command = f"iperf3 -c {host} -p {PORT} -t {STREAM_SECONDS} {STREAM}"
    async with netns.running("iperf3", "-s", "-p", str(PORT), "--forceflush", ready=READY):
        await contender.guest.run(f"{command} </dev/null >/tmp/stream 2>&1 & echo $! >/tmp/pid")
        await trio.sleep(PAUSE)
        moved = await contender.move()
        await contender.guest.run("kill $(cat /tmp/pid) || cat /tmp/stream")
    return moved


async def measure_rates(contender: Contender, netns: Netns, effort: Effort) -> Rates:
    column = contender.column
    wire = Wire(contender.guest, netns)
    return Rates(
        await wire.tcp(column, effort.seconds),
        await wire.tcp(column, effort.seconds, "-R"),
        await wire.ping_in(column, effort.pings),
    )


def publish_moves(load: str, ours: list[Moved], peer: list[Moved], publish: Publish) -> None:
    downtimes = {
        column: [one.downtime for one in moves] for column, moves in ((NATIVE, ours), (QEMU, peer))
    }
    totals = {
        column: [one.total for one in moves] for column, moves in ((NATIVE, ours), (QEMU, peer))
    }
    added = [mine - theirs for mine, theirs in zip(*downtimes.values(), strict=True)]
    publish(Figure(f"guest moved, {load}: downtime", "ms", Better.LESS, downtimes, QEMU))
    publish(
        Figure(
            f"guest moved, {load}: downtime added",
            *("ms", Better.LESS, {NATIVE: added}),
            aim=AIM_ADDED,
        )
    )
    publish(Figure(f"guest moved, {load}: whole", "ms", Better.LESS, totals, QEMU, AIM_TOTAL))
    marked = [one for one in ours if one.pages and one.marking]
    if marked:
        name = f"guest moved, {load}: pages marked"
        pages = {NATIVE: [float(one.pages) for one in marked]}
        speed = {NATIVE: [one.pages / one.marking for one in marked]}
        publish(Figure(name, "", Better.LESS, pages))
        publish(Figure(f"{name}, speed", "pages/ms", Better.MORE, speed))


def publish_rates(rates: dict[str, list[Rates]], publish: Publish) -> None:
    for name, of, better, aim in (
        ("TCP out", operator.attrgetter("tcp_out"), Better.MORE, AIM_RATE),
        ("TCP in", operator.attrgetter("tcp_in"), Better.MORE, AIM_RATE),
        ("ping", operator.attrgetter("ping"), Better.LESS, AIM_PING),
    ):
        columns = {
            column: [of(after) / of(first) for after in later]
            for column, (first, *later) in rates.items()
        }
        publish(Figure(f"{name} after moves, by before", "", better, columns, QEMU, aim))
