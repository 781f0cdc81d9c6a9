"""Two sides, each a QEMU and a server, of which any process may be killed and started anew.

The guest is Linux and on the network; or, where nothing is left of it afterwards, only firmware.
Both sides are wired to one bridge, so that the guest keeps its address wherever it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from tests.e2e import moving, traffic
from tests.server.vm.bare_qemu import bare_qemu, firmware_done
from tests.testbed.guest import boot, start
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.server_process import serve
from vfio_user_virtio.control.client import connect_control

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns
    from vfio_user_virtio.control.records import Device

SECONDS: Final = 60
"""Within which everything ends, on a machine that is busy; all of it takes a few."""

LINUX: Final = Machine(programs=("ip",), memory_mib=128)
FIRMWARE: Final = (
    *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
    *("-machine", "memory-backend=ram"),
)
BRIDGE: Final = "br0"
PAUSE: Final = 0.02


class Monitor(Protocol):
    """The test's own, beside that of the command."""

    async def execute(self, command: str) -> object: ...


class Process:
    """One that may have ended; its id is not another's then."""

    def __init__(self, pid: int, stack: AsyncExitStack) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        stack.callback(os.close, self._descriptor)

    async def wait(self) -> None:
        with trio.fail_after(SECONDS):
            await trio.lowlevel.wait_readable(self._descriptor)


@attrs.frozen
class Server:
    """`folder` has its sockets and its log."""

    process: Process
    folder: Path

    @property
    def control(self) -> Path:
        return self.folder / "control"

    async def wait_free(self, *, connected: bool) -> None:
        """Until it holds nothing, but for the session of a QEMU that is `connected`."""
        async with connect_control(str(self.control)) as client:
            with trio.fail_after(SECONDS):
                while True:
                    if all(_is_free(one, connected) for one in await client.devices()):
                        return
                    await trio.sleep(PAUSE)


def _is_free(device: Device, connected: bool) -> bool:
    migration = device.migration
    assert migration is not None
    return (
        (migration.state, migration.holder, device.dirty_log) == ("RUNNING", "nobody", "nobody")
        and not migration.half_loaded
        and (device.session is not None) == connected
    )


@attrs.frozen
class Machinery:
    """A QEMU; `qmp` is for the command.  `guest` is the Linux that is or will be in it."""

    process: Process
    qmp: Path
    monitor: Monitor
    guest: Guest | None

    async def status(self) -> str:
        """The run state."""
        said = await self.monitor.execute("query-status")
        assert isinstance(said, dict)
        return str(said["status"])

    async def wait_status(self, wanted: str) -> None:
        with trio.fail_after(SECONDS):
            while True:
                if await self.status() == wanted:
                    return
                await trio.sleep(PAUSE)


@attrs.define(eq=False)
class Side:
    """One of the two."""

    number: int
    server: Server
    qemu: Machinery


class Sides:
    """Makes them in `folder`.  With a network, their guest is Linux on `machine`."""

    def __init__(
        self,
        bed: Bed,
        folder: Path,
        stack: AsyncExitStack,
        network: Netns | None,
        machine: Machine,
    ) -> None:
        self.network = network
        self._bed = bed
        self._folder = folder
        self._stack = stack
        self._machine = machine
        self._folders = 0

    async def make(self, number: int, *, incoming: bool) -> Side:
        if self.network is not None:
            await self.network.add_tap(f"tap{number}", master=BRIDGE)
        server = await self._serve(number)
        return Side(number, server, await self._start(server, incoming=incoming))

    async def renew_server(self, side: Side, *, incoming: bool) -> None:
        """And a QEMU on it; those that were there have ended."""
        side.server = await self._serve(side.number)
        await self.renew_qemu(side, incoming=incoming)

    async def renew_qemu(self, side: Side, *, incoming: bool) -> None:
        """On the same server; the one that was there has ended."""
        side.qemu = await self._start(side.server, incoming=incoming)

    def logs(self) -> str:
        """What all servers have said."""
        return "".join(path.read_text() for path in self._folder.glob("*/server.log"))

    def _next(self) -> Path:
        self._folders += 1
        folder = self._folder / str(self._folders)
        folder.mkdir()
        return folder

    async def _serve(self, number: int) -> Server:
        folder = self._next()
        options = ["--socket-path", str(folder / "vf.sock"), "--mac", traffic.MAC]
        options += ["--control-path", str(folder / "control")]
        if self.network is not None:
            options += ["--uplink", f"tap:tap{number}"]
        wrap = None if self.network is None else self.network.wrap
        served = await self._stack.enter_async_context(serve(folder, *options, wrap=wrap))
        return Server(Process(served.process.pid, self._stack), folder)

    async def _start(self, server: Server, *, incoming: bool) -> Machinery:
        folder = self._next()
        qmp = folder / "qmp"
        words = [
            *vfio_user_pci(server.folder / "vf.sock"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
        ]
        words += ["-incoming", "defer"] * incoming
        enter = self._stack.enter_async_context
        if self.network is None:
            pid = folder / "pid"
            words += [*FIRMWARE, "-pidfile", str(pid)]
            monitor = await enter(bare_qemu(self._bed, *words))
            process = Process(int(pid.read_text()), self._stack)
            if not incoming:
                await monitor.execute("cont")
                await firmware_done(monitor)
            return Machinery(process, qmp, monitor, None)
        machine = attrs.evolve(self._machine, devices=(*self._machine.devices, *words))
        guest = await enter((start if incoming else boot)(self._bed, machine, folder))
        if not incoming:
            await traffic.configure(guest)
        return Machinery(Process(guest.process.pid, self._stack), qmp, guest.qmp, guest)


@asynccontextmanager
async def open_sides(
    bed: Bed, folder: Path, network: Netns | None = None, machine: Machine = LINUX
) -> AsyncIterator[Sides]:
    if network is not None:
        await network.disable_ipv6()
        await moving.add_bridge(network, BRIDGE, traffic.HOST)
    async with AsyncExitStack() as stack:
        yield Sides(bed, folder, stack, network, machine)


# --- the command --------------------------------------------------------------------------------


@attrs.frozen
class Said:
    """What became of a command, and what it said on standard error."""

    code: int
    text: str


def arguments(source: Side, target: Side) -> list[str]:
    return [
        *("--from-qmp", str(source.qemu.qmp), "--from-control", str(source.server.control)),
        *("--to-qmp", str(target.qemu.qmp), "--to-control", str(target.server.control)),
    ]


async def run(*words: str) -> Said:
    """A Python module with arguments; it ends within SECONDS."""
    with trio.fail_after(SECONDS):
        done = await trio.run_process(
            [sys.executable, "-m", *words],
            check=False,
            stdout=subprocess.DEVNULL,
            capture_stderr=True,
        )
    return Said(done.returncode, done.stderr.decode())
