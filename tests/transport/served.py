"""A session that serves a memory device over a socketpair, and who may be at the other end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from tests.transport.memory_device import MemoryDevice
from vfio_user_virtio.protocol.header import HEADER, REPLY, Command
from vfio_user_virtio.testing import loopback
from vfio_user_virtio.transport.client import PROPOSAL, Client, ServedMemory, connect_socket
from vfio_user_virtio.transport.endpoint import Endpoint
from vfio_user_virtio.transport.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from vfio_user_virtio.device import RemoteMemory
    from vfio_user_virtio.protocol.framing import Frame
    from vfio_user_virtio.protocol.version import Capabilities

PATIENCE: Final = 60.0
"""Seconds after which a test that waits has failed."""

QEMU_CAPABILITIES: Final = {
    "capabilities": {
        "pgsizes": 4096,
        "max_msg_fds": 16,
        "max_dma_maps": 65535,
        "max_data_xfer_size": 1048576,
        "migration": {"max_bitmap_size": 268435456, "pgsize": 4096},
        "write_multiple": True,
    }
}
"""What QEMU 11.1.3 proposes."""


def open_fds() -> int:
    """How many fds this process has."""
    return len(os.listdir("/proc/self/fd"))


def version(major: int = 0, minor: int = 0, document: object = QEMU_CAPABILITIES) -> bytes:
    """The payload of a VERSION request."""
    return struct.pack("<HH", major, minor) + json.dumps(document).encode() + b"\0"


def message(
    command: int, payload: bytes = b"", *, flags: int = 0, message_id: int = 7, size: int = -1
) -> bytes:
    """A message, well-formed unless told otherwise."""
    actual = HEADER.size + len(payload)
    return HEADER.pack(message_id, command, actual if size < 0 else size, flags, 0) + payload


class Served:
    """A memory device, the session that serves it, and the socket to be its client on."""

    def __init__(self, device: MemoryDevice, name: str) -> None:
        self.device = device
        self.socket, theirs = socket.socketpair()
        self._serving = loopback.make_session(theirs, device, name)
        self.over = trio.Event()
        """The session has ended."""

    async def run(self) -> None:
        await self._serving.run()
        self.over.set()

    @property
    def session(self) -> Session:
        """The session, of the native engine."""
        assert isinstance(self._serving, Session)
        return self._serving


@contextlib.asynccontextmanager
async def served(
    serve: Callable[[RemoteMemory], Awaitable[None]] | None = None, *, name: str = "test"
) -> AsyncIterator[Served]:
    """A session that runs, to be connected to; in the end it must be over, and no fd left."""
    before = open_fds()
    device = MemoryDevice(serve) if serve else MemoryDevice()
    one = Served(device, name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        try:
            yield one
        finally:
            one.socket.close()
        with trio.fail_after(PATIENCE):
            await one.over.wait()
    device.close()
    assert device.releases == 1
    assert device.serving == 0
    assert open_fds() == before


@contextlib.asynccontextmanager
async def client_of(
    one: Served, *, capabilities: Capabilities = PROPOSAL, memory: ServedMemory | None = None
) -> AsyncIterator[Client]:
    """Be a well-behaved client of `one`."""
    async with connect_socket(one.socket, capabilities=capabilities, memory=memory) as client:
        yield client


class RawClient:
    """Says what it is told to, however wrong, and hears what comes back."""

    def __init__(self, one: Served, sock: socket.socket | None = None) -> None:
        self.one = one
        self.endpoint = Endpoint(sock or one.socket)
        self._heard: list[Frame] = []

    def with_socket(self, fd: int) -> RawClient:
        """The same at another socket of the same session."""
        return RawClient(self.one, socket.socket(fileno=fd))

    async def say(self, data: bytes, fds: Sequence[int] = ()) -> None:
        await self.endpoint.send(data, fds)

    async def hear(self) -> Frame:
        """The next message."""
        if not self._heard:
            with trio.fail_after(PATIENCE):
                self._heard = await self.endpoint.receive()
            assert self._heard, "the session has closed the connection"
        return self._heard.pop(0)

    async def negotiate(self) -> Frame:
        await self.say(message(Command.VERSION, version()))
        reply = await self.hear()
        assert (reply.command, reply.flags) == (Command.VERSION, REPLY)
        return reply

    async def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Frame:
        """The reply to a command; no fd of it is left in the session unless a device took it."""
        await self.say(message(command, payload), fds)
        reply = await self.hear()
        assert (reply.command, reply.message_id, reply.is_reply) == (command, 7, True)
        return reply

    async def refused(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The errno a command is refused with, by a header alone, and without keeping an fd."""
        before = open_fds()
        reply = await self.ask(command, payload, fds)
        assert reply.is_error, f"not refused: {reply}"
        assert reply.payload == b""
        with trio.fail_after(PATIENCE):
            while open_fds() != before:  # noqa: ASYNC110 - another engine closes them afterwards
                await trio.sleep(0.001)
        return reply.error

    async def alive(self) -> None:
        """The session answers, and has nothing else to say."""
        await self.say(message(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
        reply = await self.hear()
        assert (reply.command, reply.is_error) == (Command.DEVICE_GET_INFO, False)
        assert not self._heard

    async def cut_off(self) -> None:
        """The session hangs up without another word."""
        assert not self._heard
        with trio.fail_after(PATIENCE):
            assert await self.endpoint.receive() == []
            await self.one.over.wait()


@contextlib.asynccontextmanager
async def raw_client(*, negotiated: bool = True) -> AsyncIterator[RawClient]:
    """A session and a raw client of it."""
    async with served() as one:
        client = RawClient(one)
        try:
            if negotiated:
                await client.negotiate()
            yield client
        finally:
            client.endpoint.close()
