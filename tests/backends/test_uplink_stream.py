"""The stream uplinks against real sockets: framing, hostile peers, reconnecting."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.switch_ports import FakeAlarm, FakeClock, MemberPort, ethernet, mac
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.uplinks.stream import (
    StreamClientUplink,
    StreamServerUplink,
    StreamUplink,
)
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_user_virtio.backends.software.ports import Uplink


def framed(*frames: bytes) -> bytes:
    return b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)


def plugged(switch: Switch, uplink: Uplink) -> MemberPort:
    a = MemberPort(switch, "a")
    switch.plug(a, a)
    switch.plug_uplink(uplink)
    return a


def exists(path: str) -> bool:
    return os.path.exists(path)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


class Wire:
    """A stream uplink on one end of a socket pair, and the other end."""

    def __init__(self) -> None:
        self.switch = Switch(alarm=FakeAlarm(), clock=FakeClock())
        self.uplink = StreamUplink(self.switch, "stream")
        self.a = plugged(self.switch, self.uplink)
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        self.ended: str | None = None

    async def serve(self) -> None:
        self.ended = await self.uplink.serve(self.ours.fileno())

    def close(self) -> None:
        self.ours.close()
        self.peer.close()

    async def receive(self, size: int) -> bytes:
        data = b""
        with trio.fail_after(5):
            while len(data) < size:
                await trio.lowlevel.wait_readable(self.peer)
                data += self.peer.recv(size - len(data))
        return data


FRAMES = [
    ethernet(mac(0), mac(1), b"first"),
    ethernet(mac(0), mac(1), bytes(1_500)),
    ethernet(mac(0), mac(1)),
]


async def test_both_ways() -> None:
    wire = Wire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        wire.peer.send(framed(*FRAMES))
        await settle()
        assert wire.a.headers == [bytes(12)] * 3
        assert wire.a.take() == FRAMES
        assert wire.a.flushes > 0
        for frame in FRAMES:
            assert wire.a.send(frame)
        assert wire.peer.recv(9_999) == framed(*FRAMES)
        nursery.cancel_scope.cancel()
    wire.close()


async def test_a_byte_at_a_time() -> None:
    wire = Wire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        await settle()
        for byte in framed(FRAMES[0], FRAMES[2]):
            wire.peer.send(bytes((byte,)))
            wire.uplink.poll()
        assert wire.a.take() == [FRAMES[0], FRAMES[2]]
        nursery.cancel_scope.cancel()
    wire.close()


@pytest.mark.parametrize("length", [limits.MAX_FRAME_SIZE + 1, 1 << 31, (1 << 32) - 1])
async def test_a_length_beyond_the_largest_frame_ends_it(length: int) -> None:
    wire = Wire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        wire.peer.send(framed(FRAMES[0]) + struct.pack("!I", length) + FRAMES[1])
        await settle()
        assert not wire.uplink.up
    assert wire.a.take() == [FRAMES[0]]
    assert wire.ended is not None
    assert f"announced a frame of {length} bytes" in wire.ended
    wire.close()


async def test_the_largest_frame_and_the_shortest() -> None:
    wire = Wire()
    largest = ethernet(mac(0), mac(1), bytes(limits.MAX_FRAME_SIZE - 14))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        await settle()
        data = framed(b"", b"x", largest, bytes(13), largest, FRAMES[0])
        with trio.fail_after(5):
            while data:
                await trio.lowlevel.wait_writable(wire.peer)
                data = data[wire.peer.send(data) :]
        await settle()
        assert wire.a.take() == [largest, largest, FRAMES[0]]
        nursery.cancel_scope.cancel()
    wire.close()


@pytest.mark.parametrize("size", range(len(framed(FRAMES[0], FRAMES[2]))))
async def test_a_stream_cut_off_anywhere(size: int) -> None:
    wire = Wire()
    data = framed(FRAMES[0], FRAMES[2])[:size]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        wire.peer.send(data)
        wire.peer.close()
    whole = 2 if size == len(framed(FRAMES[0], FRAMES[2])) else int(size >= len(framed(FRAMES[0])))
    assert wire.a.take() == [FRAMES[0], FRAMES[2]][:whole]
    assert wire.ended == "the peer closed the connection"
    wire.close()


@pytest.mark.parametrize("size", [100, 3_000, 50_000])
async def test_a_slow_peer_gets_everything_in_order(size: int) -> None:
    wire = Wire()
    wire.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    frames = [ethernet(mac(1), mac(0), bytes((n,)) * size) for n in range(100)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        await settle()
        sent = [wire.a.send(frame) for frame in frames]
        assert not all(sent)
        assert await wire.receive(len(framed(*frames))) == framed(*frames)
        assert wire.a.queue == []
        nursery.cancel_scope.cancel()
    wire.close()


@pytest.mark.parametrize("size", [3_000, 50_000])
async def test_a_peer_that_goes_while_frames_wait(size: int) -> None:
    wire = Wire()
    wire.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        await settle()
        while wire.a.send(ethernet(mac(1), mac(0), bytes(size))):
            pass
        wire.peer.close()
    assert wire.ended is not None
    assert wire.a.queue == []
    assert wire.a.send(FRAMES[0])
    wire.close()


async def test_a_peer_that_has_gone_is_noticed_in_writing() -> None:
    wire = Wire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        await settle()
        wire.peer.close()
        assert wire.a.send(FRAMES[0])
        assert not wire.uplink.up
    assert wire.ended is not None
    assert "Broken pipe" in wire.ended
    wire.close()


async def test_a_starved_member_stops_the_peer_and_not_the_process() -> None:
    wire = Wire()
    wire.a.room = 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve)
        wire.peer.send(framed(*FRAMES, *FRAMES))
        await settle()
        assert wire.a.take() == FRAMES[:2]
        wire.switch.poll(wire.a)
        wire.a.make_room(1)
        assert wire.a.take() == FRAMES[2:]
        wire.a.make_room()
        assert wire.a.take() == FRAMES
        wire.peer.send(framed(*FRAMES))
        await settle()
        assert wire.a.take() == FRAMES
        nursery.cancel_scope.cancel()
    wire.close()


async def test_a_client_connects_again_after_pauses_that_grow(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "peer")
    switch = Switch(alarm=FakeAlarm())
    uplink = StreamClientUplink(switch, path=path)
    a = plugged(switch, uplink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uplink.run)
        await trio.sleep(60)
        assert len(caplog.records) == 1
        assert "No such file" in caplog.text
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(path)
            listener.listen()
            for _ in range(2):
                peer, _ = await listener.accept()
                with peer:
                    await peer.send(framed(FRAMES[0]))
                    while not a.received:
                        await trio.lowlevel.checkpoint()
                    assert uplink.up
                    assert a.take() == [FRAMES[0]]
                    assert a.send(FRAMES[1])
                    assert await peer.recv(9_999) == framed(FRAMES[1])
        nursery.cancel_scope.cancel()


async def test_a_server_serves_one_peer_after_the_other(tmp_path: Path) -> None:
    path = str(tmp_path / "listener")
    switch = Switch(alarm=FakeAlarm())
    uplink = StreamServerUplink(switch, path=path)
    a = plugged(switch, uplink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uplink.run)
        await settle()
        assert not uplink.up
        assert a.send(FRAMES[0])  # nobody there: lost
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.connect(path)
                peer.send(framed(FRAMES[0]))
                await settle()
                assert a.take() == [FRAMES[0]]
                assert a.send(FRAMES[1])
                assert peer.recv(9_999) == framed(FRAMES[1])
            await settle()
            assert not uplink.up
        nursery.cancel_scope.cancel()
    assert not exists(path)


async def test_a_server_does_not_take_a_path_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "listener")
    switch = Switch(alarm=FakeAlarm())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(path)
        other.listen(0)
        with pytest.raises(HostError, match="another process answers"):
            await StreamServerUplink(switch, path=path).run()
    uplink = StreamServerUplink(switch, path=path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uplink.run)
        await settle()
        nursery.cancel_scope.cancel()
