"""The datagram uplink against real sockets, as QEMU's -netdev dgram uses them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.switch_ports import FakeAlarm, FakeClock, MemberPort, as_frame, ethernet, mac
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.uplinks.datagram import DatagramUplink
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.virtio.offload import NET_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Net:
    def __init__(self, folder: Path) -> None:
        self.local, self.remote = str(folder / "local"), str(folder / "remote")
        self.switch = Switch(alarm=FakeAlarm(), clock=FakeClock())
        self.a = MemberPort(self.switch, "a")
        self.uplink = DatagramUplink(self.switch, local=self.local, remote=self.remote)
        self.switch.plug(self.a, self.a)
        self.switch.plug_uplink(self.uplink)
        self.peer: socket.socket | None = None

    def start_peer(self) -> socket.socket:
        if os.path.exists(self.remote):
            os.unlink(self.remote)
        self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.peer.bind(self.remote)
        self.peer.setblocking(False)
        return self.peer


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    yield net
    if net.peer is not None:
        net.peer.close()


def exists(path: str) -> bool:
    return os.path.exists(path)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_raw_frames_both_ways_and_a_peer_that_starts_again(net: Net) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        frame = ethernet(mac(1), mac(0), bytes(1_000))
        assert net.a.send(frame)  # nobody there yet
        assert net.uplink.discarded == 1
        for _ in range(2):
            peer = net.start_peer()
            peer.sendto(frame, net.local)
            await settle()
            assert net.a.headers == [bytes(12)]
            assert net.a.take() == [frame]
            assert net.a.send(frame)
            assert peer.recv(70_000) == frame
            peer.close()
            assert net.a.send(frame)
        assert net.uplink.discarded == 3
        nursery.cancel_scope.cancel()
    assert not exists(net.local)


async def test_frames_are_finished(net: Net) -> None:
    peer = net.start_peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        header = NET_HEADER.pack(1, 0, 0, 0, 14, 2, 0)
        assert net.a.send(ethernet(mac(1), mac(0), b"\x01\x02\x00\x00"), header)
        assert peer.recv(99)[14:] == b"\x01\x02\xfe\xfd"
        nursery.cancel_scope.cancel()


async def test_what_is_no_frame_is_dropped(net: Net) -> None:
    peer = net.start_peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        largest = ethernet(mac(0), mac(1), bytes(limits.MAX_FRAME_SIZE - 14))
        for data in (b"", b"short", largest + b"x", largest):
            peer.sendto(data, net.local)
            await settle()
        assert net.a.take() == [largest]
        assert net.uplink.discarded == 1
        assert net.uplink.up
        nursery.cancel_scope.cancel()


async def test_a_slow_peer_loses_nothing(net: Net) -> None:
    peer = net.start_peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        frames = [ethernet(mac(1), mac(0), n.to_bytes(2, "big")) for n in range(1_200)]
        sent = [net.a.send(frame) for frame in frames]
        assert not all(sent)
        got: list[bytes] = []
        with trio.fail_after(10):
            while len(got) < len(frames):
                await trio.lowlevel.wait_readable(peer)
                got.append(peer.recv(99))
        assert got == frames
        nursery.cancel_scope.cancel()


async def test_a_starved_member_leaves_frames_with_the_kernel(net: Net) -> None:
    peer = net.start_peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        net.a.room = 2
        frames = [ethernet(mac(0), mac(1), bytes((n,))) for n in range(5)]
        for frame in frames:
            peer.sendto(frame, net.local)
        await settle()
        assert len(net.a.received) == 2
        net.switch.poll(net.a)
        assert len(net.a.received) == 2
        net.a.make_room()
        assert net.a.take() == frames
        nursery.cancel_scope.cancel()


async def test_a_stale_path_is_taken_over_and_others_are_not(net: Net) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(net.local)
        with pytest.raises(HostError, match="another process answers"):
            await net.uplink.run()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await settle()
        assert net.uplink.up
        os.unlink(net.local)  # and somebody else takes the path
        os.mknod(net.local)
        nursery.cancel_scope.cancel()
    assert exists(net.local)
    with pytest.raises(HostError, match="is not a socket"):
        await net.uplink.run()


async def test_a_path_that_cannot_be_bound(tmp_path: Path) -> None:
    switch = Switch(alarm=FakeAlarm())
    for path in (str(tmp_path / "no" / "folder"), str(tmp_path / ("x" * 108))):
        with pytest.raises(HostError, match="cannot bind a UNIX socket"):
            await DatagramUplink(switch, local=path, remote="r").run()


async def test_before_and_after_its_run_it_takes_frames_and_loses_them(net: Net) -> None:
    frame, size = as_frame(ethernet(mac(1), mac(0)))
    assert net.uplink.deliver(frame, size)
    net.uplink.poll()
