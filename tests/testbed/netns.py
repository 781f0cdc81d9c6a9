"""A network namespace for one test: TAP devices, addresses, commands and sockets inside it.

A holder process keeps the namespace; it ends with the test process, and with it all devices.  As
root only the network namespace is new; otherwise a user namespace comes with it, in which the
user is root.  Named namespaces (`ip netns`) were rejected: they need root and outlive a crash.
"""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.testbed.bed import Bed

OPENER: Final = """
import fcntl, socket, struct, sys
kind, name = sys.argv[1:3]
if kind == "tap":
    TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
    file = open("/dev/net/tun", "r+b", buffering=0)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(),
        IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
elif kind == "listen":
    file = socket.create_server(("", int(name)))
else:
    ETH_P_ALL = 0x0003
    file = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    file.bind((name, 0))
channel = socket.socket(fileno=0)
socket.send_fds(channel, [b"x"], [file.fileno()])
"""
"""Opens a TAP device or a socket inside the namespace and hands its descriptor out."""


class NoNamespaces(Exception):
    """The system allows this user no network namespace or no TAP device."""


class CommandFailed(Exception):
    """A command inside the namespace failed; the message has what it printed."""


class Netns:
    """A namespace that a holder keeps; `open_netns` makes one."""

    def __init__(self, bed: Bed, holder: int, *, user: bool) -> None:
        self.holder = holder
        self.user = user
        self._bed = bed
        self._prefix = ["nsenter", f"--target={holder}", "--net"]
        if user:
            self._prefix += ["--user", "--preserve-credentials"]

    def wrap(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` inside; its process is `argv`'s own, not a parent of it."""
        return [*self._prefix, *argv]

    def command(self, *argv: str) -> list[str]:
        """The command that runs a program of the bed, or an applet of its busybox, inside."""
        name, *arguments = argv
        applets = ("ping", "sh")
        run = self._bed.applet(name) if name in applets else self._bed.command(name)
        return self.wrap([*run, *arguments])

    async def run(self, *argv: str, stdin: bytes = b"") -> str:
        """What a `command` printed; raises `CommandFailed`."""
        done = await trio.run_process(
            self.command(*argv),
            stdin=stdin,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            raise CommandFailed(f"`{' '.join(argv)}` failed with {done.returncode}:\n{output}")
        return output

    @asynccontextmanager
    async def running(self, *argv: str, ready: str) -> AsyncIterator[None]:
        """A `command` that runs meanwhile and has printed `ready`; killed at the end."""
        process = await trio.lowlevel.open_process(
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        output = b""
        try:
            while ready.encode() not in output:
                data = await process.stdout.receive_some()
                if not data:
                    raise CommandFailed(f"`{' '.join(argv)}` ended:\n{output.decode()}")
                output += data
            yield
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def disable_ipv6(self) -> None:
        """No address on devices made from here on, so that the kernel sends nothing of its own."""
        path = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
        await self.run("sh", "-c", f"echo 1 >{path}")

    async def add_tap(
        self, name: str, address: str = "", mtu: int = 1500, *, master: str = ""
    ) -> None:
        """A TAP device with vnet_hdr that stays without anybody attached, up, with an address.

        `master`: the bridge whose port it is.
        """
        await self.run("ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr")
        await self.run("ip", "link", "set", name, "mtu", str(mtu), "up")
        if master:
            await self.run("ip", "link", "set", name, "master", master)
        if address:
            await self.run("ip", "address", "add", address, "dev", name)

    async def open_tap(self, name: str) -> int:
        """A descriptor of the TAP device, made if it is not there; the caller closes it."""
        return await self._open("tap", name)

    async def open_packet_socket(self, name: str) -> socket.socket:
        """An AF_PACKET socket bound to the device: all frames, from the Ethernet header on."""
        return socket.socket(fileno=await self._open("packet", name))

    async def listen(self, port: int) -> trio.SocketListener:
        """A TCP listener on all addresses of the namespace, for use from outside."""
        sock = socket.socket(fileno=await self._open("listen", str(port)))
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def _open(self, kind: str, name: str) -> int:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            argv = self.wrap([sys.executable, "-c", OPENER, kind, name])
            await trio.run_process(argv, stdin=theirs)
            _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        return descriptor


@functools.cache
def unshare_options() -> tuple[str, ...]:
    """`unshare` options that this user may have; raises `NoNamespaces`."""
    said = ""
    for options in (("--net",), ("--net", "--user", "--map-root-user")):
        command = ["unshare", *options, "sh", "-c", ": 3<>/dev/net/tun"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return options
        said = done.stderr.strip()
    raise NoNamespaces(f"no network namespace with TAP devices for this user: {said}")


@asynccontextmanager
async def open_netns(bed: Bed, beside: Netns | None = None) -> AsyncIterator[Netns]:
    """A new namespace with its loopback up; raises `NoNamespaces`.

    `beside`: another one, whose user may give it devices.
    """
    options = unshare_options() if beside is None else ("--net",)
    command = ["unshare", *options, "sh", "-c", "echo up; exec cat"]
    holder = await trio.lowlevel.open_process(
        beside.wrap(command) if beside else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        if not await holder.stdout.receive_some():
            raise NoNamespaces(f"`unshare {' '.join(options)}` gave no namespace")
        user = beside.user if beside else "--user" in options
        netns = Netns(bed, holder.pid, user=user)
        await netns.run("ip", "link", "set", "lo", "up")
        yield netns
    finally:
        holder.send_signal(signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await holder.wait()
