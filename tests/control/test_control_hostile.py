"""Peers that do not keep to varlink: an error, or the end of their connection and no other."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from vfio_user_virtio import limits
from vfio_user_virtio.control.client import ControlClient, VarlinkClient, control_of
from vfio_user_virtio.control.connections import serve_connection, serve_control
from vfio_user_virtio.control.interface import CONTROL
from vfio_user_virtio.control.service import ControlService
from vfio_user_virtio.control.varlink import Splitter, VarlinkError
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.testing.loopback import ungrouped_nursery

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from vfio_user_virtio.control.varlink import Call, Object

GET_INFO = b'{"method":"org.varlink.service.GetInfo"}\0'


class Peer:
    """A raw connection to a service without devices."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._splitter = Splitter(1 << 24)
        self._messages: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def reply(self) -> dict[str, object]:
        while not self._messages:
            data = bytes(await self.stream.receive_some(1 << 16))
            assert data, "the connection is closed"
            self._messages += self._splitter.feed_untrusted(data)
        found = json.loads(self._messages.pop(0))
        assert isinstance(found, dict)
        return found

    async def is_closed(self) -> None:
        with trio.fail_after(60):
            with contextlib.suppress(trio.BrokenResourceError):
                assert await self.stream.receive_some(1) == b""


@contextlib.asynccontextmanager
async def peer(service: ControlService | None = None) -> AsyncIterator[Peer]:
    ours, theirs = socket.socketpair()
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, service or ControlService([]))
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            yield Peer(stream)


async def test_calls_may_come_at_once_and_in_pieces() -> None:
    async with peer() as one:
        await one.send(GET_INFO * 3 + GET_INFO[:7])
        await one.send(GET_INFO[7:])
        for _ in range(4):
            assert "parameters" in await one.reply()


@pytest.mark.parametrize(
    "data", [b"\0", b"{}\0", b"nonsense\0", b"[" * 1000 + b"\0", b'{"method": "x"}\0']
)
async def test_what_is_no_call_closes_after_what_came_before(data: bytes) -> None:
    async with peer() as one:
        await one.send(GET_INFO + data + GET_INFO)
        assert "error" not in await one.reply()
        await one.is_closed()


async def test_a_message_without_an_end_closes() -> None:
    async with peer() as one:
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(2 * limits.MAX_CONTROL_MESSAGE >> 16):
                await one.send(b" " * (1 << 16))
        await one.is_closed()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"method": "a.b.C"}, "InterfaceNotFound"),
        ({"method": "org.varlink.service.Nothing"}, "MethodNotFound"),
        ({"method": "org.varlink.service.GetInfo", "upgrade": True}, "MethodNotImplemented"),
        ({"method": "org.varlink.service.GetInfo", "parameters": {"x": 1}}, "InvalidParameter"),
        ({"method": "org.varlink.service.GetInterfaceDescription"}, "InvalidParameter"),
        (
            {"method": f"{CONTROL.name}.Quiesce", "parameters": {"device": "\0\ud800"}},
            "DeviceNotFound",
        ),
    ],
)
async def test_errors_leave_the_connection_usable(call: dict[str, object], error: str) -> None:
    async with peer() as one:
        await one.send(json.dumps(call).encode() + b"\0" + GET_INFO)
        assert str((await one.reply())["error"]).endswith(f".{error}")
        assert "error" not in await one.reply()


async def test_oneway_has_no_reply_be_it_an_error() -> None:
    async with peer() as one:
        for method in ("org.varlink.service.GetInfo", "a.b.C"):
            await one.send(json.dumps({"method": method, "oneway": True}).encode() + b"\0")
        await one.send(2 * GET_INFO)
        for _ in range(2):  # were there others, the second would be an error
            assert "error" not in await one.reply()


async def test_half_a_message_may_not_stay_so(autojump_clock: trio.testing.MockClock) -> None:
    async with peer() as one:
        await trio.sleep(1000)  # silence between messages may
        await one.send(GET_INFO + b"{")
        await one.reply()
        start = trio.current_time()
        await one.is_closed()
        assert trio.current_time() - start == pytest.approx(limits.CONTROL_SECONDS)


async def test_nor_by_a_byte_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    async with peer() as one:
        start = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await one.send(b" ")
                await trio.sleep(limits.CONTROL_SECONDS / 4)
        assert trio.current_time() - start <= 2 * limits.CONTROL_SECONDS


async def test_who_takes_no_replies_is_left(autojump_clock: trio.testing.MockClock) -> None:
    call = {
        "method": "org.varlink.service.GetInterfaceDescription",
        "parameters": {"interface": CONTROL.name},
    }
    async with peer() as one:
        with trio.move_on_after(1), contextlib.suppress(trio.BrokenResourceError):
            await one.send((json.dumps(call).encode() + b"\0") * 5000)
        await trio.sleep(limits.CONTROL_SECONDS + 1)
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await one.send(GET_INFO)


class Broken(ControlService):
    """Fails as no service should."""

    def __init__(self) -> None:
        super().__init__([])

    async def answer_untrusted(self, call: Call, *_: object) -> Object:
        raise ZeroDivisionError(call.method)


async def test_a_service_that_fails_ends_that_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with peer(Broken()) as one:
        await one.send(GET_INFO)
        await one.is_closed()
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "unexpected failure" in record.message
    caplog.clear()


async def test_no_more_connections_than_the_limit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen(64)
        async with ungrouped_nursery() as nursery:
            nursery.start_soon(serve_control, listener, ControlService([]))
            async with contextlib.AsyncExitStack() as stack:
                made: list[ControlClient] = []
                for _ in range(limits.MAX_CONTROL_CONNECTIONS):
                    made.append(await connected(stack, tmp_path))
                    await made[-1].devices()
                turned_away = await connected(stack, tmp_path)
                with pytest.raises(ConnectionLost):
                    await turned_away.devices()
                for control in made:
                    assert await control.devices() == []
            async with contextlib.AsyncExitStack() as stack:
                while True:
                    control = await connected(stack, tmp_path)
                    with contextlib.suppress(ConnectionLost):
                        assert await control.devices() == []
                        break
            nursery.cancel_scope.cancel()


async def connected(stack: contextlib.AsyncExitStack, folder: Path) -> ControlClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(folder / "c"))
    return await stack.enter_async_context(control_of(sock))


# --- servers that lie ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lying(*replies: bytes) -> AsyncIterator[ControlClient]:
    """A client whose server gives these replies, and then closes."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"".join(reply + b"\0" for reply in replies))
    theirs.shutdown(socket.SHUT_WR)
    with theirs:
        async with control_of(ours) as control:
            yield control


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"{",
        b'{"parameters": {}}',
        b'{"parameters": {"devices": [{}]}}',
        b'{"parameters": {"devices": []}, "continues": true}',
        b'{"error": 5}',
    ],
)
async def test_a_client_believes_no_nonsense(reply: bytes) -> None:
    async with lying(reply) as control:
        with pytest.raises(ConnectionLost):
            await control.devices()


async def test_a_client_takes_errors_and_the_end() -> None:
    async with lying(b'{"error": "a.B", "parameters": {"x": 1}}') as control:
        with pytest.raises(VarlinkError, match=r"a\.B \(x: 1\)"):
            await control.devices()
        with pytest.raises(ConnectionLost, match="closed"):
            await control.devices()


async def test_a_client_takes_what_it_does_not_know() -> None:
    async with lying(b'{"parameters": {"devices": [], "more": 1}}') as control:
        assert await control.devices() == []


@pytest.mark.parametrize("data", ["?", "\u00e9"])
async def test_a_client_takes_only_base64(data: str) -> None:
    reply = json.dumps({"parameters": {"data": data}}).encode()
    async with lying(reply) as control:
        with pytest.raises(ConnectionLost, match="base64"):
            await control.read_image("vm")


async def test_a_stream_that_was_left_early_ends_the_connection() -> None:
    more = b'{"parameters": {"mappings": []}, "continues": true}'
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(3 * (more + b"\0"))
        client = VarlinkClient(ours)
        async with client.stream(CONTROL, "GetMappings", {"device": "vm"}) as replies:
            async for _ in replies:
                break
        with pytest.raises(ConnectionLost, match="given up"):
            await client.call(CONTROL, "GetDevices", {})
        await client.aclose()
