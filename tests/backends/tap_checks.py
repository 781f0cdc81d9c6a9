"""The TAP uplink on real devices; run by test_uplink_tap.py inside a network namespace."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from tests.backends.switch_ports import (
    ALL,
    BROADCAST,
    FakeAlarm,
    MemberPort,
    as_frame,
    ethernet,
    mac,
)
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.uplinks import tun_device
from vfio_user_virtio.backends.software.uplinks.tap import TapUplink
from vfio_user_virtio.backends.software.uplinks.tun_device import (
    TapDevice,
    open_tap,
    tap_from_fd,
)
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.virtio.offload import NET_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
HOST = mac(0xAAAA)


def ip(*arguments: str) -> bytes:
    return subprocess.run(("ip", *arguments), check=True, capture_output=True).stdout


def make_tap(name: str, *flags: str, up: bool = True) -> None:
    ip("tuntap", "add", "dev", name, "mode", "tap", *flags)
    ip("link", "set", name, "addrgenmode", "none", "address", HOST.hex(":"))
    if up:
        ip("link", "set", name, "up")


@attrs.frozen
class Host:
    """The host's side of a TAP device, seen through a packet socket with virtio_net_hdr."""

    packets: socket.socket

    def send(self, data: bytes, header: bytes = bytes(10)) -> None:
        self.packets.send(header + data)

    def receive(self) -> bytes:
        return self.packets.recv(70_000)[10:]

    def nothing(self) -> bool:
        try:
            return not self.packets.recv(70_000)
        except BlockingIOError:
            return True


@pytest.fixture
def host() -> Iterator[Host]:
    make_tap("tap0", "vnet_hdr")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as packets:
        packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        packets.bind(("tap0", 0))
        packets.setblocking(False)
        yield Host(packets)
    if "tap0" in [name for _, name in socket.if_nameindex()]:
        ip("link", "delete", "tap0")


@attrs.frozen
class Net:
    switch: Switch
    uplink: TapUplink
    members: list[MemberPort]


def plugged(members: int = 1, device: TapDevice | None = None) -> Net:
    switch = Switch(alarm=FakeAlarm())
    uplink = TapUplink(switch, device or open_tap("tap0"))
    ports = [MemberPort(switch, f"member {number}") for number in range(members)]
    for port in ports:
        switch.plug(port, port)
    switch.plug_uplink(uplink)
    while b"state UP" not in ip("link", "show", "tap0"):
        pass  # until then the device has a carrier but no qdisc, and sends nothing
    return Net(switch, uplink, ports)


@pytest.fixture(params=["direct", "switched"])
def members(request: pytest.FixtureRequest) -> int:
    return {"direct": 1, "switched": 2}[request.param]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # what is awaited is plain state of fake ports
            await trio.sleep(0.001)


async def test_frames_go_both_ways(host: Host, members: int) -> None:
    net = plugged(members)
    a = net.members[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        assert (net.switch.direct_receiver(net.uplink) is a) == (members == 1)
        out = ethernet(HOST, mac(0), b"o" * 1_400)
        assert a.send(out)
        assert host.receive() == out
        host.send(ethernet(mac(0), HOST, b"i" * 1_400))
        await until(lambda: a.received)
        assert a.take() == [ethernet(mac(0), HOST, b"i" * 1_400)]
        assert a.flushes > 0
        if members == 2:
            assert net.members[1].take() == [out]  # nobody knew then where the host was
        nursery.cancel_scope.cancel()
    net.uplink.close()
    net.switch.refresh()  # which must not touch the closed descriptor


async def test_the_answer_is_there_at_once(host: Host) -> None:
    """The host's kernel answers an ARP request within the writev: `poll` finds it."""
    net = plugged()
    (a,) = net.members
    ip("address", "add", "192.0.2.1/24", "dev", "tap0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        who_has = bytes.fromhex("0001080006040001") + mac(0) + bytes((192, 0, 2, 9)) + bytes(6)
        a.send(BROADCAST + mac(0) + b"\x08\x06" + who_has + bytes((192, 0, 2, 1)))
        net.switch.flush()
        net.switch.poll(a)
        assert [frame[12:14] + frame[20:22] for frame in a.take()] == [b"\x08\x06\x00\x02"]
        nursery.cancel_scope.cancel()
    net.uplink.close()


def big_tcp() -> tuple[bytes, bytes]:
    """10,000 bytes of TCP in one frame, unfinished: its header and the frame."""
    payload = bytes(10_000)
    total = (40 + len(payload)).to_bytes(2, "big")
    ipv4 = bytes((0x45, 0)) + total + bytes((0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2))
    words = sum(struct.unpack("!10H", ipv4))
    words = (words & 0xFFFF) + (words >> 16)
    ipv4 = ipv4[:10] + (0xFFFF - words).to_bytes(2, "big") + ipv4[12:]
    pseudo = sum(struct.unpack("!4H", ipv4[12:20])) + 6 + 20 + len(payload)
    tcp = bytes((3, 232, 0, 80)) + bytes(8) + bytes((0x50, 0x10, 1, 0))
    tcp += pseudo.to_bytes(2, "big") + bytes(2)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1_000, 34, 16)
    return header, mac(0) + HOST + b"\x08\x00" + ipv4 + tcp + payload


async def test_the_kernel_finishes_what_receivers_do_not_take(host: Host, members: int) -> None:
    net = plugged(members)
    a = net.members[0]
    header, frame = big_tcp()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        host.send(frame, header)
        await until(lambda: a.received)
        assert a.headers[0][:2] == b"\x01\x01"
        assert a.take() == [frame]
        a.offloads = Offload(0)
        net.switch.refresh()
        host.send(frame, header)
        await until(lambda: len(a.received) == 10)
        assert all(header[:2] == bytes(2) for header in a.headers)
        assert [len(segment) for segment in a.take()] == [1_054] * 10
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_what_was_queued_before_is_finished_here(host: Host, members: int) -> None:
    net = plugged(members)
    a = net.members[0]
    header, frame = big_tcp()
    host.send(frame, header)
    a.offloads = Offload(0)
    net.switch.refresh()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await until(lambda: len(a.received) == 10)
        assert [len(segment) for segment in a.take()] == [1_054] * 10
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_a_guest_sends_unfinished_frames(host: Host) -> None:
    net = plugged()
    (a,) = net.members
    header, frame = big_tcp()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        assert net.uplink.offloads == ALL
        a.send(HOST + mac(0) + frame[12:], header + bytes(2))
        received = host.packets.recv(70_000)
        assert received[10:] == HOST + mac(0) + frame[12:]
        assert received[1] == 1
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_a_starved_member_leaves_frames_with_the_kernel(host: Host, members: int) -> None:
    net = plugged(members)
    a = net.members[0]
    frames = [ethernet(mac(0), HOST, bytes((n,)) * 100) for n in range(5)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        a.send(ethernet(HOST, mac(0)))
        a.room = 2
        for frame in frames:
            host.send(frame)
        await until(lambda: len(a.received) == 2)
        await trio.testing.wait_all_tasks_blocked()
        drained = 0

        def drain() -> None:
            nonlocal drained
            drained += 1

        net.uplink.drain = drain  # type: ignore[method-assign]  # nobody may call it now
        await trio.sleep(0.05)
        net.switch.poll(a)
        assert drained == 0
        del net.uplink.drain
        a.make_room()
        assert a.take() == frames
        host.send(frames[0])
        await until(lambda: a.received)
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_a_device_that_goes_takes_the_port_down(
    host: Host, members: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = plugged(members)
    a = net.members[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        ip("link", "delete", "tap0")
        await until(lambda: not net.uplink.up)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "tap tap0 is down" in caplog.text
    assert a.send(ethernet(HOST, mac(0)))
    net.uplink.close()


async def test_a_device_that_goes_is_noticed_in_writing(host: Host) -> None:
    net = plugged()
    (a,) = net.members
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        ip("link", "delete", "tap0")
        assert a.send(ethernet(HOST, mac(0)))
        assert not net.uplink.up
    net.uplink.close()


async def test_what_the_kernel_refuses_is_counted(host: Host) -> None:
    net = plugged()
    (a,) = net.members
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        liar = NET_HEADER.pack(0, 0, 9_999, 0, 0, 0, 0)
        assert a.send(ethernet(HOST, mac(0)), NET_HEADER.pack(1, 0, 9_999, 0, 14, 0, 0))
        assert a.send(ethernet(HOST, mac(0)), liar)
        assert net.uplink.discarded == 2
        ip("link", "set", "tap0", "down")
        assert a.send(ethernet(HOST, mac(0)))
        assert net.uplink.discarded == 3
        ip("link", "set", "tap0", "up")
        assert host.packets.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
        assert a.send(ethernet(HOST, mac(0)))
        assert host.receive() == ethernet(HOST, mac(0))
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_more_pieces_than_one_writev_takes(host: Host) -> None:
    net = plugged()
    (a,) = net.members
    data = ethernet(HOST, mac(0), bytes(1_400))
    frame, size = as_frame(data)
    pieces = [frame[0], *(bytes((byte,)) for byte in data[18:])]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await trio.testing.wait_all_tasks_blocked()
        assert net.switch.forward(a, pieces, size)
        assert host.receive() == data
        nursery.cancel_scope.cancel()
    net.uplink.close()


async def test_memory_that_a_client_has_taken_away(host: Host) -> None:
    """A mapping whose file was cut short: EFAULT is the guest's loss, not the uplink's."""
    import mmap

    memory = os.memfd_create("guest")
    os.ftruncate(memory, 131_072)
    net = plugged()
    (a,) = net.members
    with mmap.mmap(memory, 131_072) as area:
        view = memoryview(area)
        a.reserve = lambda: (view,)  # type: ignore[method-assign]  # guest memory
        os.ftruncate(memory, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(net.uplink.run)
            await trio.testing.wait_all_tasks_blocked()
            host.send(ethernet(mac(0), HOST))
            await until(lambda: net.uplink.discarded)
            assert net.switch.forward(a, (*as_frame(ethernet(HOST, mac(0)))[0], view[:9]), 40)
            assert net.uplink.up
            assert net.uplink.discarded == 2
            nursery.cancel_scope.cancel()
        view.release()
    os.close(memory)
    net.uplink.close()


# --- devices ------------------------------------------------------------------------------------


async def test_a_descriptor_without_vnet_hdr(host: Host) -> None:
    ip("link", "delete", "tap0")
    make_tap("tap0")
    fd = os.open(tun_device.TUN_PATH, os.O_RDWR)
    request = struct.pack("16sH22x", b"tap0", tun_device.IFF_TAP | tun_device.IFF_NO_PI)
    fcntl.ioctl(fd, 0x400454CA, request)
    device = tap_from_fd(fd)
    assert (device.name, device.vnet_hdr, device.offloads) == ("tap0", False, Offload(0))
    net = plugged(1, device)
    (a,) = net.members
    header, frame = big_tcp()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as packets:
        packets.bind(("tap0", 0))
        packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        packets.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(net.uplink.run)
            await trio.testing.wait_all_tasks_blocked()
            a.send(HOST + mac(0) + frame[12:], header + bytes(2))
            assert [len(packets.recv(70_000)) for _ in range(10)] == [1_054] * 10
            packets.send(ethernet(mac(0), HOST))
            await until(lambda: a.received)
            assert a.headers == [bytes(12)]
            assert a.take() == [ethernet(mac(0), HOST)]
            nursery.cancel_scope.cancel()
    net.uplink.close()


def test_a_multi_queue_device(host: Host) -> None:
    ip("link", "delete", "tap0")
    make_tap("tap0", "vnet_hdr", "multi_queue")
    first, second = open_tap("tap0"), open_tap("tap0")
    os.close(first.fd)
    os.close(second.fd)


def test_offloads_follow_the_receivers(host: Host) -> None:
    device = open_tap("tap0")
    for wanted in (
        ALL,
        Offload(0),
        Offload.CSUM,
        Offload.TSO4,
        Offload.CSUM | Offload.ECN,
        Offload.CSUM | Offload.USO4,
        Offload.CSUM | Offload.TSO6 | Offload.ECN,
    ):
        device.set_offloads(wanted)
    os.close(device.fd)


def test_errors_have_a_remedy(host: Host) -> None:
    with pytest.raises(HostError, match=r"there is no network interface nope.*ip tuntap add"):
        open_tap("nope")
    for name in ("", "x" * 16):
        with pytest.raises(HostError, match="1 to 15"):
            open_tap(name)
    ip("link", "set", "tap0", "down")
    with pytest.raises(HostError, match=r"tap0 is down.*ip link set tap0 up"):
        open_tap("tap0")
    ip("link", "set", "tap0", "up")
    device = open_tap("tap0")
    with pytest.raises(HostError, match="tap0 is in use by another process"):
        open_tap("tap0")
    os.close(device.fd)
    ip("link", "set", "lo", "up")
    with pytest.raises(HostError, match="lo is not a TAP device"):
        open_tap("lo")
    with open("/dev/null", "rb") as null, pytest.raises(HostError, match="not attached"):
        tap_from_fd(null.fileno())
    fd = os.open(tun_device.TUN_PATH, os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tun7", 0x1001))
    with pytest.raises(HostError, match="must be a TAP device"):
        tap_from_fd(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "belongs to another user; recreate it"),
        (errno.EBUSY, "in use by another process"),
        (errno.EINVAL, "is not a TAP device"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_words_for_attaching(number: int, words: str) -> None:
    assert words in tun_device.attach_error("tap0", OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "give this user read and write access"), (errno.ENOENT, "module tun")],
)
def test_words_for_opening(number: int, words: str) -> None:
    assert words in tun_device.open_error(OSError(number, os.strerror(number)))


def test_no_descriptor_is_leaked(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = open_tap("tap0")
    with pytest.raises(HostError):
        open_tap("tap0")
    os.close(device.fd)
    assert len(os.listdir("/proc/self/fd")) == before
