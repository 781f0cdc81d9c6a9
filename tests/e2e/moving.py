"""Two QEMUs and two servers, and a guest that goes from one to the other under traffic.

Both servers are wired to one bridge by a TAP device each, so that the guest's address stays what it
is and the way to it changes; each NIC of a guest has a bridge and a network of its own.  The
traffic is made so that whatever is lost, doubled or stale is seen: pings that are counted, and a
TCP stream each way whose every byte is checked at its end; the device writes what comes to the
guest straight to its memory, which QEMU does not see.  What the guest itself writes meanwhile, and
reads late, is in `loading`.

An end may be on another host, as far as one machine can show it: a network namespace of its own.
Its sockets are then reached as ssh reaches them, by a relay that passes bytes and no descriptors.
"""

from __future__ import annotations

import hashlib
import random
import re
import signal
import socket
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.e2e import traffic
from tests.testbed.guest import boot, start
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.netns import open_netns
from tests.testbed.relay import forwarding
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
OUT: Final = 5001
BACK: Final = 5002
BLOCK: Final = 1 << 18
BUFFER: Final = BLOCK // 4
"""Of the host's sockets, of which the kernel makes twice as much."""
MAY_PING: Final = "/proc/sys/net/ipv4/ping_group_range"
"""Who of a namespace may send echo requests without privilege: at first nobody."""
PINGS_PER_SECOND: Final = 10
PAUSE: Final = 0.05
"""Seconds that this host waits after each block of a stream, received or sent: a machine of two
cores has time for all else as well then."""


MEMBER: Final = """
[[owner]]
name = "owner{nic.number}"
uplink = "tap:{tap}"
[[owner.member]]
name = "{nic.served}"
socket_path = "{socket}"
mac = "{nic.mac}"
queue_pairs = {queue_pairs}
"""


@attrs.frozen
class Nic:
    """One of the guest's: its id in QEMU, its server's name of it, and who is on its network."""

    number: int
    ident: str
    served: str
    mac: str
    guest: str
    host: str

    @property
    def device(self) -> str:
        return f"eth{self.number - 1}"

    @property
    def bridge(self) -> str:
        return f"br{self.number - 1}"


ONLY: Final = Nic(1, "vf", "device", traffic.MAC, traffic.GUEST, traffic.HOST)
"""Of a server that has no other."""
TWO: Final = (
    Nic(1, "vf", "nic1", traffic.MAC, traffic.GUEST, traffic.HOST),
    Nic(2, "vf2", "nic2", "52:54:00:00:01:02", "10.0.1.2", "10.0.1.1"),
)


@attrs.define
class End:
    """A QEMU, its server, and the sockets by which both are driven."""

    folder: Path
    server: ServerProcess
    guest: Guest
    nics: tuple[Nic, ...]
    taps: list[str]
    near: str = ""
    """Before the names of its sockets, if they are forwarded."""

    @property
    def qmp(self) -> Path:
        return self.folder / f"{self.near}qmp"

    @property
    def control(self) -> Path:
        return self.folder / f"{self.near}control"

    @asynccontextmanager
    async def forwarded(self) -> AsyncIterator[str]:
        """Its sockets are reached as from another host; where its test protocol is then."""
        names = ("qmp", "control", "qtest")
        self.near = "near-"
        async with forwarding({self.folder / f"near-{name}": self.folder / name for name in names}):
            yield f"{self.folder / 'near-qtest'}:{self.folder / 'qtest'}"
        self.near = ""


class Mover:
    """Starts ends, and moves the guest between them; made by `open_mover`."""

    def __init__(
        self,
        bed: Bed,
        netns: Netns,
        folder: Path,
        machine: Machine,
        options: tuple[str, ...],
        nics: tuple[Nic, ...],
    ) -> None:
        self._bed = bed
        self._netns = netns
        self._folder = folder
        self._machine = machine
        self._options = options
        self._nics = nics
        self._count = 0
        self._stack = AsyncExitStack()

    async def end(self, *, incoming: bool, host: Netns | None = None) -> End:
        """A new one: with a guest that has booted and is on the network, or that waits for it.

        `host`: where it is, QEMU as well; otherwise QEMU is outside of all namespaces.
        """
        self._count += 1
        folder = self._folder / f"end{self._count}"
        folder.mkdir()
        netns = host or self._netns
        taps = [await self._add_tap(netns, nic) for nic in self._nics]
        server = await self._stack.enter_async_context(
            serve(folder, *self._served(folder, taps), wrap=netns.wrap)
        )
        devices = ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
        for nic in self._nics:
            devices += vfio_user_pci(_socket(folder, nic), slot=nic.number, ident=nic.ident)
        if incoming:
            devices += ["-incoming", "defer"]
        machine = attrs.evolve(self._machine, devices=(*self._machine.devices, *devices))
        begin = start if incoming else boot
        wrap = None if host is None else host.wrap
        guest = await self._stack.enter_async_context(begin(self._bed, machine, folder, wrap))
        if not incoming:
            for nic in self._nics:
                await traffic.configure(guest, nic.device, nic.guest)
        return End(folder, server, guest, self._nics, taps)

    async def _add_tap(self, netns: Netns, nic: Nic) -> str:
        tap = f"tap{self._count}.{nic.number}"
        await netns.add_tap(tap, master=nic.bridge)
        return tap

    def _served(self, folder: Path, taps: list[str]) -> list[str]:
        """What `serve` is told."""
        if self._nics == (ONLY,):
            device = ["--socket-path", str(_socket(folder, ONLY)), "--mac", ONLY.mac]
            device += ["--uplink", f"tap:{taps[0]}", "--control-path", str(folder / "control")]
            return [*device, *self._options]
        text = f'[control]\nsocket_path = "{folder / "control"}"\n'
        for nic, tap in zip(self._nics, taps, strict=True):
            text += MEMBER.format(
                nic=nic, tap=tap, socket=_socket(folder, nic), queue_pairs=self._machine.cpus
            )
        path = folder / "devices.toml"
        path.write_text(text)
        return ["--config", str(path), *self._options]

    async def aclose(self) -> None:
        await self._stack.aclose()


def _socket(folder: Path, nic: Nic) -> Path:
    return folder / f"{nic.ident}.sock"


@asynccontextmanager
async def open_mover(
    bed: Bed,
    netns: Netns,
    folder: Path,
    *options: str,
    machine: Machine = MACHINE,
    nics: tuple[Nic, ...] = (ONLY,),
) -> AsyncIterator[Mover]:
    """`options` are further ones of both servers.

    Several `nics` are of one server, with a queue pair for each processor.
    """
    await netns.disable_ipv6()
    for nic in nics:
        await add_bridge(netns, nic.bridge, nic.host)
    mover = Mover(bed, netns, folder, machine, options, nics)
    try:
        yield mover
    finally:
        await mover.aclose()


async def add_bridge(netns: Netns, name: str, address: str, mac: str = traffic.HOST_MAC) -> None:
    """A bridge that keeps its MAC address.

    One that was given none takes the lowest of its ports', and so another one when a TAP device is
    added; a guest that has the old one in mind then sends to nobody, until it asks again.
    """
    await netns.run("ip", "link", "add", name, "address", mac, "type", "bridge")
    await netns.run("ip", "link", "set", name, "up")
    await netns.run("ip", "address", "add", f"{address}/24", "dev", name)


FAR: Final = "10.0.0.3"
FAR_MAC: Final = "52:54:00:00:00:03"
"""Where the other host is."""


@asynccontextmanager
async def open_other_host(bed: Bed, netns: Netns) -> AsyncIterator[Netns]:
    """A namespace with a bridge of its own, which is wired to the first of `netns`."""
    async with open_netns(bed, beside=netns) as other:
        await other.disable_ipv6()
        await add_bridge(other, ONLY.bridge, FAR, FAR_MAC)
        ends = ("wire", "type", "veth", "peer", "name", "wire", "netns", str(other.holder))
        await netns.run("ip", "link", "add", *ends)
        for end in (netns, other):
            await end.run("ip", "link", "set", "wire", "master", ONLY.bridge, "up")
        yield other


def command(source: End, target: End, *options: str) -> list[str]:
    """The command that moves the guest; the devices are named if there are several."""
    named = source.nics if len(source.nics) > 1 else ()
    return [
        COMMAND,
        "migrate-vm",
        *("--from-qmp", str(source.qmp), "--from-control", str(source.control)),
        *("--to-qmp", str(target.qmp), "--to-control", str(target.control)),
        *(word for nic in named for word in ("--device", f"{nic.ident}={nic.served}")),
        *options,
    ]


async def move(
    source: End,
    target: End,
    on_step: Callable[[str], None] = lambda _: None,
    *,
    marked: bool = True,
) -> Move:
    """The same in this process: `on_step` may fail it at any step.  Raises HostError.

    Not `marked`: QEMU is not told of what the devices wrote.
    """

    def step(name: str) -> None:
        on_step(name)
        if name == "mark pages" and not marked:
            for device in devices:
                assert device.written_bytes
                device.written = ()

    async with (
        open_qmp(await dial(str(source.qmp)), "source") as from_qmp,
        open_qmp(await dial(str(target.qmp)), "target") as to_qmp,
        connect_server(str(source.control)) as from_server,
        connect_server(str(target.control)) as to_server,
    ):
        devices = [
            MovedDevice(nic.ident, Place(from_server, nic.served), Place(to_server, nic.served))
            for nic in source.nics
        ]
        moved = Move(Qemu(from_qmp), Qemu(to_qmp), devices, on_step=step)
        try:
            await moved.run()
        finally:
            assert moved.failed == []
        return moved


# --- traffic ------------------------------------------------------------------------------------


class Traffic:
    """Pings ten times a second and a TCP stream each way; `running_traffic` makes it."""

    def __init__(self, nursery: trio.Nursery, netns: Netns, nic: Nic, pause: float) -> None:
        self.bytes_out = 0
        self.bytes_back = 0
        self._nursery = nursery
        self._netns = netns
        self._nic = nic
        self._pause = pause
        self._sent = hashlib.sha256()
        self._damaged = 0
        self._ending = False
        self._more = trio.Event()
        self._done = [trio.Event(), trio.Event()]
        self._ping: trio.Process | None = None

    async def start(self, guest: Guest) -> None:
        host, files = self._nic.host, f"/tmp/{self._nic.ident}"
        await guest.run(f"head -c {BLOCK} /dev/urandom >{files}.block")
        block = bytes.fromhex((await guest.run(f"sha256sum <{files}.block")).split()[0])
        async with (
            await self._netns.listen(OUT) as out,
            await self._netns.listen(BACK) as back,
        ):
            out.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            back.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            await guest.run(
                f"(while cat {files}.block; do :; done | nc {host} {OUT}) "
                "</dev/null >/dev/null 2>&1 &\n"
                f"(nc {host} {BACK} | sha256sum >{files}.sum; touch {files}.done) "
                "</dev/null >/dev/null 2>&1 &"
            )
            self._nursery.start_soon(self._receive, await out.accept(), block)
            self._nursery.start_soon(self._send, await back.accept())
        self._ping = await trio.lowlevel.open_process(
            self._netns.command("ping", "-i", str(1 / PINGS_PER_SECOND), self._nic.guest),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    async def pass_more(self, blocks: int = 8) -> None:
        """Until that much more has come from the guest and gone to it; two `blocks` at least.

        This takes a guest that lives: what the host's sockets hold is part of one block (`BUFFER`),
        and another may have been almost sent before.
        """
        assert blocks >= 2
        out, back = self.bytes_out + blocks * BLOCK, self.bytes_back + blocks * BLOCK
        with trio.fail_after(60):
            while self.bytes_out < out or self.bytes_back < back:
                self._more = trio.Event()
                await self._more.wait()

    async def check(self, guest: Guest, *, moves: int) -> None:
        """End it, wherever `guest` is: everything was whole.

        Of the pings, a second may be lost for each of `moves`.
        """
        self._ending = True
        for done in self._done:
            await done.wait()
        assert self._damaged == 0, "blocks from the guest"
        files = f"/tmp/{self._nic.ident}"
        await guest.run(f"while ! [ -e {files}.done ]; do usleep 10000; done")
        received = (await guest.run(f"cat {files}.sum")).split()[0]
        assert received == self._sent.hexdigest(), "what came to the guest"
        assert self._ping is not None
        assert self._ping.stdout is not None
        self._ping.send_signal(signal.SIGINT)
        text = b"".join([data async for data in self._ping.stdout]).decode()
        await self._ping.wait()
        counted = re.search(r"(\d+) packets transmitted, (\d+) packets received(.*)", text)
        assert counted is not None, text
        assert "duplicates" not in counted[3], text
        sent, lost = int(counted[1]), int(counted[1]) - int(counted[2])
        print(f"{sent} pings, {lost} lost")
        assert sent > 10
        assert lost <= PINGS_PER_SECOND * moves, text

    async def stop(self) -> None:
        """No more pings, if there are still any."""
        if self._ping is not None and self._ping.returncode is None:
            self._ping.kill()
            with trio.CancelScope(shield=True):
                await self._ping.wait()

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
                    await trio.sleep(self._pause)
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
                await trio.sleep(self._pause)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        self._done[1].set()


@asynccontextmanager
async def running_traffic(
    netns: Netns, guest: Guest, nic: Nic = ONLY, *, pause: float = PAUSE
) -> AsyncIterator[Traffic]:
    """Traffic with `guest`, which is on the network, until its `check`; `pause` after a block."""
    async with trio.open_nursery() as nursery:
        running = Traffic(nursery, netns, nic, pause)
        await running.start(guest)
        try:
            yield running
        finally:
            await running.stop()
        nursery.cancel_scope.cancel()
