"""The client with a server that misbehaves, by a plain socket at the other end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.transport.served import PATIENCE, client_of, message, open_fds, served, version
from vfio_user_virtio.device import FeatureOperation, VfioRegion
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.limits import HANDSHAKE_SECONDS, MAX_PENDING_REQUESTS
from vfio_user_virtio.protocol.header import ERROR, NO_REPLY, REPLY, Command
from vfio_user_virtio.protocol.region_io_fds import (
    IoFd,
    decode_region_io_fds_request_untrusted,
    encode_region_io_fds_reply,
)
from vfio_user_virtio.protocol.version import TwinSocketCapability
from vfio_user_virtio.transport.client import PROPOSAL, Client, connect_socket
from vfio_user_virtio.transport.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from vfio_user_virtio.protocol.framing import Frame

GRANTED = version(document={"capabilities": {"max_msg_fds": 8}})


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[tuple[socket.socket, Endpoint]]:
    """A socket for the client, and the endpoint of a server that a test plays."""
    ours, theirs = socket.socketpair()
    endpoint = Endpoint(theirs)
    try:
        yield ours, endpoint
    finally:
        endpoint.close()
        ours.close()


async def next_command(endpoint: Endpoint) -> Frame:
    with trio.fail_after(PATIENCE):
        (frame,) = await endpoint.receive()
    return frame


def reply(frame: Frame, payload: bytes = b"", flags: int = REPLY) -> bytes:
    return message(frame.command, payload, flags=flags, message_id=frame.message_id)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Client, Endpoint]]:
    """A client that has negotiated with a server that a test plays."""
    async with server() as (sock, endpoint), trio.open_nursery() as nursery:

        async def negotiate() -> None:
            await endpoint.send(reply(await next_command(endpoint), GRANTED))

        nursery.start_soon(negotiate)
        async with connect_socket(sock) as client:
            yield client, endpoint


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        pytest.param(b"", REPLY, id="nothing"),
        pytest.param(b"\0\0\0\0{", REPLY, id="not JSON"),
        pytest.param(version(major=1), REPLY, id="major 1"),
        pytest.param(version(minor=1), REPLY, id="minor 1"),
        pytest.param(GRANTED, REPLY | 7, id="no reply at all"),
        pytest.param(
            version(document={"capabilities": {"twin_socket": {"supported": True}}}),
            REPLY,
            id="a twin socket without an fd",
        ),
    ],
)
async def test_version_is_answered_with_nonsense(payload: bytes, flags: int) -> None:
    async with server() as (sock, endpoint), trio.open_nursery() as nursery:

        async def answer() -> None:
            await endpoint.send(reply(await next_command(endpoint), payload, flags))

        nursery.start_soon(answer)
        with pytest.raises(ConnectionLost):
            async with connect_socket(sock):
                pass


async def test_version_is_refused() -> None:
    async with server() as (sock, endpoint), trio.open_nursery() as nursery:

        async def answer() -> None:
            await endpoint.send(reply(await next_command(endpoint), flags=REPLY | ERROR))

        nursery.start_soon(answer)
        with pytest.raises(RemoteError, match="VERSION was refused"):
            async with connect_socket(sock):
                pass


async def test_version_is_not_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with server() as (sock, _):
        with pytest.raises(ConnectionLost, match="no reply to VERSION within 10 s"):
            async with connect_socket(sock):
                pass
    assert trio.current_time() >= HANDSHAKE_SECONDS


async def test_twin_socket_that_is_no_socket() -> None:
    proposal = attrs.evolve(PROPOSAL, twin_socket=TwinSocketCapability(supported=True))
    twin = {"capabilities": {"twin_socket": {"supported": True, "fd_index": 1}}}
    async with server() as (sock, endpoint), trio.open_nursery() as nursery:

        async def answer() -> None:
            fd = os.eventfd(0)
            command = await next_command(endpoint)
            await endpoint.send(reply(command, version(document=twin)), [fd, fd, fd])
            os.close(fd)

        nursery.start_soon(answer)
        with pytest.raises(ConnectionLost, match="the twin socket is none"):
            async with connect_socket(sock, capabilities=proposal):
                pass


async def test_errors_of_the_caller_leave_as_they_are() -> None:
    async with served() as one:
        with pytest.raises(KeyError, match="the caller's"):
            async with client_of(one):
                raise KeyError("the caller's")


async def test_server_that_goes_wakes_every_request_and_refuses_new_ones() -> None:
    async with connected() as (client, endpoint), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ConnectionLost, match="the server closed the connection"):
                await client.device_info()

        for _ in range(MAX_PENDING_REQUESTS + 5):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        endpoint.close()
        await client.lost.wait()
        with pytest.raises(ConnectionLost):
            await client.reset()
        with pytest.raises(ConnectionLost):
            await client.region_write(0, 0, b"x", no_reply=True)


async def test_requests_beyond_the_limit_wait_for_their_turn() -> None:
    count = 3 * MAX_PENDING_REQUESTS
    async with connected() as (client, endpoint):
        heard: list[Frame] = []
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(client.reset)
            while len(heard) < count:
                await trio.testing.wait_all_tasks_blocked()
                batch = await endpoint.receive()
                assert len(batch) <= MAX_PENDING_REQUESTS
                heard += batch
                for frame in reversed(batch):  # in any order
                    await endpoint.send(reply(frame))
    assert len({frame.message_id for frame in heard}) == count


async def test_message_ids_wrap_and_skip_those_in_use() -> None:
    async with connected() as (client, endpoint), trio.open_nursery() as nursery:
        nursery.start_soon(client.reset)
        first = await next_command(endpoint)
        client._requests._ids.next = 0xFFFF
        for expected in (0xFFFF, 0, first.message_id + 1):
            nursery.start_soon(client.reset)
            frame = await next_command(endpoint)
            assert frame.message_id == expected
            await endpoint.send(reply(frame))
            await trio.testing.wait_all_tasks_blocked()
        await endpoint.send(reply(first))


@pytest.mark.parametrize(
    ("command", "payload", "flags"),
    [
        (Command.DEVICE_RESET, b"", 0),
        (Command.DMA_READ, bytes(16), 0),
        (Command.DMA_READ, b"", 0),
        (Command.DMA_WRITE, struct.pack("<QQ", 0, 9), 0),
        (77, bytes(1000), 0),
    ],
)
async def test_commands_that_a_client_does_not_serve_are_refused(
    command: int, payload: bytes, flags: int
) -> None:
    async with connected() as (_, endpoint):
        await endpoint.send(message(command, payload, flags=NO_REPLY))
        await endpoint.send(message(command, payload, flags=flags))
        answer = await next_command(endpoint)
        assert (answer.command, answer.is_reply, answer.is_error) == (command, True, True)
        assert answer.payload == b""


async def test_abandoned_request_gives_up_the_fds_of_its_reply() -> None:
    async with connected() as (client, endpoint):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.region_info, 0)
                command = await next_command(endpoint)
                scope.cancel()
        fd = os.eventfd(0)
        await endpoint.send(reply(command, bytes(32)), [fd])
        os.close(fd)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.reset)
            await endpoint.send(reply(await next_command(endpoint)))


async def test_reply_that_comes_together_with_the_cancellation() -> None:
    async with connected() as (client, endpoint):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.region_info, 0)
                command = await next_command(endpoint)
                fd = os.eventfd(0)
                await endpoint.send(reply(command, struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0)), [fd])
                os.close(fd)
                scope.cancel()


@pytest.mark.parametrize("argsz", [31, 1 << 30, (1 << 32) - 1])
async def test_region_information_of_absurd_size(argsz: int) -> None:
    async with connected() as (client, endpoint), trio.open_nursery() as nursery:

        async def answer() -> None:
            command = await next_command(endpoint)
            await endpoint.send(reply(command, struct.pack("<IIIIQQ", argsz, 0, 0, 0, 0, 0)))

        nursery.start_soon(answer)
        with pytest.raises(ConnectionLost):
            await client.region_info(0)


@pytest.mark.parametrize("what", ["region_info", "region_io_fds", "feature"])
async def test_answer_that_grows_whenever_it_is_asked_for(what: str) -> None:
    async with connected() as (client, endpoint), trio.open_nursery() as nursery:

        async def answer() -> None:
            while True:
                command = await next_command(endpoint)
                argsz, flags = struct.unpack_from("<II", command.payload)
                payload = struct.pack("<IIIIQQ", argsz + 1, flags, 0, 0, 0, 0)
                await endpoint.send(reply(command, payload))

        nursery.start_soon(answer)
        ask: dict[str, Callable[[], Awaitable[object]]] = {
            "region_info": lambda: client.region_info(0),
            "region_io_fds": lambda: client.region_io_fds(0),
            "feature": lambda: client.feature(1, FeatureOperation.GET),
        }
        with pytest.raises(ConnectionLost, match="asked for"):
            await ask[what]()
        nursery.cancel_scope.cancel()


async def test_region_io_fds_are_asked_for_again_with_room_for_them() -> None:
    async with connected() as (client, endpoint), trio.open_nursery() as nursery:
        entries = tuple(IoFd(offset, 4, index, 0) for index, offset in enumerate((0, 8)))

        async def answer() -> None:
            fds = [os.eventfd(0), os.eventfd(0)]
            for expected in (16, 16 + 2 * 40):
                command = await next_command(endpoint)
                request = decode_region_io_fds_request_untrusted(command.payload)
                assert request.argsz == expected
                payload = encode_region_io_fds_reply(request, entries)
                await endpoint.send(reply(command, payload), fds)
            for fd in fds:
                os.close(fd)

        nursery.start_soon(answer)
        found, fds = await client.region_io_fds(0)
        assert found == entries
        assert len(fds) == 2
        for fd in fds:
            os.close(fd)


async def test_many_tasks_share_a_client() -> None:
    async with served() as one, client_of(one) as client, trio.open_nursery() as nursery:

        async def poke(number: int) -> None:
            for turn in range(20):
                data = struct.pack("<II", number, turn)
                await client.region_write(VfioRegion.BAR0, number * 8, data)
                assert await client.region_read(VfioRegion.BAR0, number * 8, 8) == data

        for number in range(100):
            nursery.start_soon(poke, number)


async def test_messages_no_method_would_send() -> None:
    async with served() as one, client_of(one) as client:
        await client.endpoint.send(message(Command.REGION_WRITE, b"short", flags=NO_REPLY))
        await client.device_info()
        assert one.session.statistics().errors == 1
