"""One client after the other on a listening socket."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.transport.memory_device import MemoryDevice
from tests.transport.served import PATIENCE, message, open_fds, version
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.protocol.header import Command
from vfio_user_virtio.transport.client import connect
from vfio_user_virtio.transport.listener import serve_connected, serve_listener
from vfio_user_virtio.transport.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.transport.listener import Serving


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


class Server:
    """A device behind a listening socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = MemoryDevice()
        self.sessions: list[Serving] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(2)

    async def run(self) -> None:
        await serve_listener(
            self.listener, self.device, name="dev0", on_session=self.sessions.append
        )

    def close(self) -> None:
        self.listener.close()
        self.device.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path / "socket")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        yield made
        nursery.cancel_scope.cancel()
    made.close()


async def test_clients_come_and_go(server: Server) -> None:
    for number in range(20):
        async with connect(server.path) as client:
            if number:
                assert await client.region_read(VfioRegion.BAR0, 0, 1) == bytes([number - 1])
            await client.region_write(VfioRegion.BAR0, 0, bytes([number]))
    assert len(server.sessions) == 20
    assert len({session.statistics().version for session in server.sessions}) == 1


async def test_client_that_is_killed_and_started_again_finds_a_released_device(
    server: Server,
) -> None:
    for number in range(20):
        killed = socket.socket(socket.AF_UNIX)
        killed.connect(str(server.path))
        fd = os.eventfd(0)
        arm = message(Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 0x24, 2, 0, 1))
        killed.sendall(message(Command.VERSION, version()))
        socket.send_fds(killed, [arm], [fd])
        killed.close()
        os.close(fd)
        async with connect(server.path) as client:
            await client.device_info()
            assert server.device.releases == 2 * number + 1


async def test_second_client_waits_for_the_first_and_that_is_said(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    served_second = trio.Event()

    async def second() -> None:
        async with connect(server.path) as client:
            await client.device_info()
            served_second.set()

    async with trio.open_nursery() as nursery:
        async with connect(server.path) as first:
            await first.device_info()
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            assert not served_second.is_set()
            waiting = "dev0: another client waits until this session is over"
            assert caplog.messages.count(waiting) == 1
            await first.device_info()
        with trio.fail_after(PATIENCE):
            await served_second.wait()


async def test_failing_device_serves_the_next_client(server: Server) -> None:
    async with connect(server.path) as client:
        server.device.failure = ValueError("a bug")
        with pytest.raises(ConnectionLost):
            await client.reset()
    async with connect(server.path) as client:
        await client.reset()


async def test_out_of_fds_is_waited_out(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    refusals = [errno.ECONNABORTED, errno.EMFILE, errno.EAGAIN, errno.ENOMEM]

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if refusals:
                raise OSError(refusals.pop(0), "not now")
            return super().accept()

    async with connect(server.path) as client:
        await client.device_info()
        exhausted = Exhausted(fileno=os.dup(server.listener.fileno()))
        device = MemoryDevice()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_listener, exhausted, device)
            async with connect(server.path) as other:
                await other.device_info()
            nursery.cancel_scope.cancel()
        exhausted.close()
        device.close()
    assert sum("cannot accept a client" in message for message in caplog.messages) == 2


async def test_listener_that_is_broken_is_no_session_s_matter() -> None:
    device = MemoryDevice()
    with socket.socket(socket.AF_UNIX) as not_listening, pytest.raises(OSError, match="nvalid"):
        await serve_listener(not_listening, device)
    device.close()


async def test_connected_socket_is_served_to_its_end() -> None:
    ours, theirs = socket.socketpair()
    device = MemoryDevice()
    ours.sendall(message(Command.VERSION, version()) + message(Command.DEVICE_RESET))
    ours.shutdown(socket.SHUT_WR)
    session = await serve_connected(theirs, device)
    assert session.statistics().commands == {"VERSION": 1, "DEVICE_RESET": 1}
    assert theirs.fileno() == -1
    ours.close()
    device.close()


@pytest.mark.parametrize("own_engine", [True, False])
async def test_sessions_of_every_engine_are_told_of(own_engine: bool) -> None:
    ours, theirs = socket.socketpair()
    device = MemoryDevice()
    told: list[Serving] = []

    def make_session(sock: socket.socket, device: Device, name: str) -> Serving:
        assert not told
        return Session(sock, device, name=f"other {name}")

    ours.close()
    session = await serve_connected(
        theirs,
        device,
        name="dev0",
        on_session=told.append,
        make_session=None if own_engine else make_session,
    )
    assert told == [session]
    assert isinstance(session, Session)
    assert session.name == ("dev0" if own_engine else "other dev0")
    device.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory; is a server listening"):
        async with connect(tmp_path / "nothing"):
            pass


async def test_backlog_that_stays_full(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        waiting.connect(str(tmp_path / "socket"))
        with pytest.raises(HostError, match="too many others wait there"):
            async with connect(tmp_path / "socket"):
                pass


async def test_a_listening_socket_that_is_shut_down_ends_the_listener(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        listener.shutdown(socket.SHUT_RDWR)
        device = MemoryDevice()
        with trio.fail_after(PATIENCE), pytest.raises(OSError, match="shut"):
            await serve_listener(listener, device)
        device.close()
