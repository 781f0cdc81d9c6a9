"""Two QEMUs and two servers, and a guest that goes from one to the other under traffic.

Both servers are wired to one bridge by a TAP device each, so that the guest's address stays what it
is and the way to it changes.  The traffic is made so that whatever is lost, doubled or stale is
seen: pings that are counted, and a TCP stream each way whose every byte is checked at its end; the
device writes what comes to the guest straight to its memory, which QEMU does not see.
"""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.e2e import traffic
from tests.testbed.guest import boot, start
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.server_process import COMMAND, serve
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.vm.control import connect_server
from vfio_user_virtio_server.vm.move import Move, MovedDevice, Place
from vfio_user_virtio_server.vm.qemu import Qemu
from vfio_user_virtio_server.vm.qmp import open_qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns
    from tests.testbed.server_process import ServerProcess

MACHINE: Final = Machine(programs=("ip", "ethtool"), memory_mib=256)
BRIDGE: Final = "br0"
OUT: Final = 5001
BACK: Final = 5002
BLOCK: Final = 1 << 20
PINGS_PER_SECOND: Final = 10
PAUSE: Final = 0.05
"""Seconds after a block, so that a machine of two cores has time for all else as well."""


@attrs.define
class End:
    """A QEMU, its server, and the sockets by which both are driven."""

    folder: Path
    server: ServerProcess
    guest: Guest

    @property
    def qmp(self) -> Path:
        return self.folder / "qmp"

    @property
    def control(self) -> Path:
        return self.folder / "control"


class Mover:
    """Starts ends, and moves the guest between them; made by `open_mover`."""

    def __init__(
        self, bed: Bed, netns: Netns, folder: Path, machine: Machine, options: tuple[str, ...]
    ) -> None:
        self._bed = bed
        self._netns = netns
        self._folder = folder
        self._machine = machine
        self._options = options
        self._count = 0
        self._stack = AsyncExitStack()

    async def end(self, *, incoming: bool) -> End:
        """A new one: with a guest that has booted and is on the network, or that waits for it."""
        self._count += 1
        folder = self._folder / f"end{self._count}"
        folder.mkdir()
        tap = f"tap{self._count}"
        await self._netns.add_tap(tap)
        await self._netns.run("ip", "link", "set", tap, "master", BRIDGE)
        socket = folder / "vf.sock"
        server = await self._stack.enter_async_context(
            serve(
                folder,
                *("--socket-path", str(socket), "--mac", traffic.MAC),
                *("--uplink", f"tap:{tap}", "--control-path", str(folder / "control")),
                *self._options,
                wrap=self._netns.wrap,
            )
        )
        devices = [*vfio_user_pci(socket), "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
        if incoming:
            devices += ["-incoming", "defer"]
        machine = attrs.evolve(self._machine, devices=(*self._machine.devices, *devices))
        begin = start if incoming else boot
        guest = await self._stack.enter_async_context(begin(self._bed, machine, folder))
        if not incoming:
            await traffic.configure(guest)
        return End(folder, server, guest)

    async def aclose(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def open_mover(
    bed: Bed, netns: Netns, folder: Path, *options: str, machine: Machine = MACHINE
) -> AsyncIterator[Mover]:
    """`options` are further ones of both servers."""
    await netns.disable_ipv6()
    await netns.run("ip", "link", "add", BRIDGE, "type", "bridge")
    await netns.run("ip", "link", "set", BRIDGE, "up")
    await netns.run("ip", "address", "add", f"{traffic.HOST}/24", "dev", BRIDGE)
    mover = Mover(bed, netns, folder, machine, options)
    try:
        yield mover
    finally:
        await mover.aclose()


def command(source: End, target: End, *options: str) -> list[str]:
    """The command that moves the guest."""
    return [
        COMMAND,
        "migrate-vm",
        *("--from-qmp", str(source.qmp), "--from-control", str(source.control)),
        *("--to-qmp", str(target.qmp), "--to-control", str(target.control)),
        *options,
    ]


async def move(source: End, target: End, on_step: Callable[[str], None]) -> Move:
    """The same in this process: `on_step` may fail it at any step.  Raises HostError."""
    async with (
        open_qmp(await dial(str(source.qmp)), "source") as from_qmp,
        open_qmp(await dial(str(target.qmp)), "target") as to_qmp,
        connect_server(str(source.control)) as from_server,
        connect_server(str(target.control)) as to_server,
    ):
        places = Place(from_server, "device"), Place(to_server, "device")
        moved = Move(Qemu(from_qmp), Qemu(to_qmp), [MovedDevice("vf", *places)], on_step=on_step)
        try:
            await moved.run()
        finally:
            assert moved.failed == []
        return moved


# --- traffic ------------------------------------------------------------------------------------


class Traffic:
    """Pings ten times a second and a TCP stream each way; `running_traffic` makes it."""

    def __init__(self, nursery: trio.Nursery, netns: Netns) -> None:
        self.bytes_out = 0
        self.bytes_back = 0
        self._nursery = nursery
        self._netns = netns
        self._sent = hashlib.sha256()
        self._damaged = 0
        self._ending = False
        self._more = trio.Event()
        self._done = [trio.Event(), trio.Event()]
        self._ping: trio.Process | None = None

    async def start(self, guest: Guest) -> None:
        await guest.run(f"head -c {BLOCK} /dev/urandom >/tmp/block")
        block = bytes.fromhex((await guest.run("sha256sum </tmp/block")).split()[0])
        async with (
            await self._netns.listen(OUT) as out,
            await self._netns.listen(BACK) as back,
        ):
            await guest.run(
                f"(while cat /tmp/block; do :; done | nc {traffic.HOST} {OUT}) "
                "</dev/null >/dev/null 2>&1 &\n"
                f"(nc {traffic.HOST} {BACK} | sha256sum >/tmp/sum; touch /tmp/done) "
                "</dev/null >/dev/null 2>&1 &"
            )
            self._nursery.start_soon(self._receive, await out.accept(), block)
            self._nursery.start_soon(self._send, await back.accept())
        self._ping = await trio.lowlevel.open_process(
            self._netns.command("ping", "-i", str(1 / PINGS_PER_SECOND), traffic.GUEST),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    async def pass_more(self, blocks: int = 8) -> None:
        """Until that much more has come from the guest and gone to it."""
        out, back = self.bytes_out + blocks * BLOCK, self.bytes_back + blocks * BLOCK
        with trio.fail_after(60):
            while self.bytes_out < out or self.bytes_back < back:
                self._more = trio.Event()
                await self._more.wait()

    async def check(self, guest: Guest) -> tuple[int, int]:
        """End it, wherever `guest` is: everything was whole.  Pings that were sent, and lost."""
        self._ending = True
        for done in self._done:
            await done.wait()
        assert self._damaged == 0, "blocks from the guest"
        await guest.run("while ! [ -e /tmp/done ]; do usleep 10000; done")
        received = (await guest.run("cat /tmp/sum")).split()[0]
        assert received == self._sent.hexdigest(), "what came to the guest"
        assert self._ping is not None
        assert self._ping.stdout is not None
        self._ping.send_signal(signal.SIGINT)
        text = b"".join([data async for data in self._ping.stdout]).decode()
        await self._ping.wait()
        counted = re.search(r"(\d+) packets transmitted, (\d+) packets received(.*)", text)
        assert counted is not None, text
        assert "duplicates" not in counted[3], text
        return int(counted[1]), int(counted[1]) - int(counted[2])

    async def _receive(self, stream: trio.SocketStream, block: bytes) -> None:
        async with stream:
            have = bytearray()
            while not self._ending or have:
                data = await stream.receive_some(BLOCK)
                assert data, "the guest has closed the stream"
                have += data
                self.bytes_out += len(data)
                self._more.set()
                if len(have) >= BLOCK:
                    self._damaged += hashlib.sha256(have[:BLOCK]).digest() != block
                    del have[:BLOCK]
                    if self._ending:
                        break
                    await trio.sleep(PAUSE)
        self._done[0].set()

    async def _send(self, stream: trio.SocketStream) -> None:
        generator = random.Random(1)
        async with stream:
            while not self._ending:
                data = generator.randbytes(BLOCK)
                self._sent.update(data)
                await stream.send_all(data)
                self.bytes_back += BLOCK
                self._more.set()
                await trio.sleep(PAUSE)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        self._done[1].set()


@asynccontextmanager
async def running_traffic(netns: Netns, guest: Guest) -> AsyncIterator[Traffic]:
    """Traffic with `guest`, which is on the network, until its `check`."""
    async with trio.open_nursery() as nursery:
        running = Traffic(nursery, netns)
        await running.start(guest)
        yield running
        nursery.cancel_scope.cancel()
