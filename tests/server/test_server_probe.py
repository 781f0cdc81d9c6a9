"""probe: what it says of our device, what it leaves as it was, and what a hostile server can do."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.server_process import client, run, served, short_folder, unprivileged
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.errors import ClientError, ConnectionLost, HostError, RemoteError
from vfio_user_virtio.testing.loopback import served as loopback
from vfio_user_virtio.transport.client import connect_socket
from vfio_user_virtio_server import probe
from vfio_user_virtio_server.device_facts import DeviceFacts, read_device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


OPTIONS = ("--mac", "52:54:00:12:34:56", "--mtu", "9000", "--queue-pairs", "2")

KEYS = {
    "": "socket protocol flags regions irqs pci virtio net problems",
    "protocol": "version max_msg_fds max_data_xfer_size max_dma_maps pgsizes write_multiple "
    "twin_socket migration",
    "regions": "index name size flags areas",
    "irqs": "index name count flags",
    "pci": "vendor_id device_id revision_id class_code subsystem_vendor_id subsystem_id command "
    "status interrupt_pin bar_kinds capabilities",
    "virtio": "features_offered features_driver status config_generation config_msix_vector "
    "num_queues queues",
    "net": "mac link_up announce max_virtqueue_pairs mtu speed duplex",
}


def test_json_has_the_promised_keys_and_the_device_in_it(folder: Path) -> None:
    with served("--socket-path", folder / "s", *OPTIONS) as server:
        result = run("probe", "--socket-path", folder / "s", "--json")
        assert server.stop()[0] == 0
    assert (result.returncode, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    for part, keys in KEYS.items():
        value = facts[part] if part else facts
        first = value[0] if isinstance(value, list) else value
        assert list(first) == keys.split()
    assert facts["net"] == {
        "mac": "52:54:00:12:34:56",
        "link_up": True,
        "announce": False,
        "max_virtqueue_pairs": 2,
        "mtu": 9000,
        "speed": None,
        "duplex": "full",
    }
    roles = [(queue["role"], queue["size"]) for queue in facts["virtio"]["queues"]]
    names = ["receiveq1", "transmitq1", "receiveq2", "transmitq2", "controlq"]
    assert roles == [(name, 256) for name in names]
    assert {"VERSION_1", "MQ", "MTU", "MAC"} <= set(facts["virtio"]["features_offered"])
    assert facts["virtio"]["features_driver"] == []
    assert facts["problems"] == []
    assert (facts["pci"]["vendor_id"], facts["pci"]["device_id"]) == (0x1AF4, 0x1041)


def test_text_for_people(folder: Path) -> None:
    with served("--socket-path", folder / "s", *OPTIONS):
        result = run("probe", "--socket-path", folder / "s")
    assert (result.returncode, result.stderr) == (0, "")
    first, *rest = result.stdout.splitlines()
    assert first == (
        f"{folder}/s: Ethernet controller [0200]: virtio network device [1af4:1041] (rev 01)"
    )
    text = "\n".join(line.strip() for line in rest)
    for line in (
        "Region 4: BAR4 (memory, 64-bit, prefetchable) [size=16K] read write",
        "IRQ 2: MSIX, count 6 (EVENTFD)",
        "MSI-X: enabled-, masked-, vectors 6, table_bar 1, table_offset 0x0",
        "virtio: cfg_type NOTIFY, bar 4, offset 0x3000, length 0x1000, notify_off_multiplier 4",
        "PCI Express: version 2, type Endpoint, flr+",
        "Power Management: version 3, state D0",
        "Network: MAC 52:54:00:12:34:56, link up, MTU 9000, speed unknown, duplex full",
        "4: controlq, size 256, not enabled",
        "vfio-user: version 0.0, max_msg_fds 16",
    ):
        assert line in text


async def test_only_what_must_be_written_is_written_and_put_back() -> None:
    owner = Owner("o")
    member = owner.add_member(MemberConfig(mac=bytes.fromhex("525400123456")))
    common = member.function.common.state
    common.device_feature_select, common.driver_feature_select, common.queue_select = 77, 1, 2
    common.status = 3
    member.function.isr = 1
    before, config = attrs.asdict(common), member.function.config.state()
    async with loopback(member) as guest:
        facts = await read_device(guest)
    assert facts.virtio is not None
    assert facts.virtio.status == ["ACKNOWLEDGE", "DRIVER"]
    assert attrs.asdict(common) == before
    assert member.function.config.state() == config
    assert member.function.isr == 1


async def test_the_control_queue_is_where_the_driver_sees_it() -> None:
    """Its number depends on MQ having been negotiated, not offered."""
    owner = Owner("o")
    member = owner.add_member(MemberConfig(mac=bytes.fromhex("525400123456"), queue_pairs=2))
    common = member.function.common.state
    common.driver_features = 1 << 32 | 1 << 17
    common.status = 8
    async with loopback(member) as guest:
        facts = await read_device(guest)
    assert facts.virtio is not None
    roles = [queue.role for queue in facts.virtio.queues]
    assert roles == ["receiveq1", "transmitq1", "controlq", "unused", "unused"]


async def test_what_is_refused_is_a_problem_and_the_rest_is_shown() -> None:
    class Stubborn:
        def __getattr__(self, name: str) -> object:
            return getattr(member, name)

        async def region_read(self, index: int, offset: int, count: int) -> bytes:
            if index == 4:
                raise ClientError(5, "no")
            return await member.region_read(index, offset, count)

    owner = Owner("o")
    member = owner.add_member(MemberConfig(mac=bytes.fromhex("525400123456")))
    async with loopback(Stubborn()) as guest:  # type: ignore[arg-type]  # a Device by delegation
        facts = await read_device(guest)
    assert facts.pci is not None
    assert facts.pci.device_id == 0x1041
    assert any("of region 4" in problem for problem in facts.problems)
    assert "\n".join(probe.lines("s", facts)).count("Problem: ") == len(facts.problems)


class HostileServer:
    """Answers VERSION properly and everything else with `answers`, of which those with an odd
    length follow the fixed part of the request."""

    def __init__(self, sock: socket.socket, answers: Iterator[bytes]) -> None:
        self._sock = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._answers = answers

    async def run(self) -> None:
        async with self._sock:
            while header := await self._exactly(16):
                message_id, command, size, _, _ = struct.unpack("<HHIII", header)
                payload = await self._exactly(size - 16)
                if command == 1:
                    answer = payload[:4] + b'{"capabilities":{}}\0'
                else:
                    made_up = next(self._answers, None)
                    if made_up is None:
                        return
                    answer = payload[:16] + made_up if len(made_up) % 2 else made_up
                head = struct.pack("<HHIII", message_id, command, 16 + len(answer), 1, 0)
                await self._sock.send_all(head + answer)

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self._sock.receive_some(size - len(data))
            if not more:
                return b""
            data += more
        return data


async def read_from(answers: list[bytes]) -> DeviceFacts | None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    facts = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HostileServer(theirs, iter(answers)).run)
        try:
            async with connect_socket(ours) as guest:
                facts = await read_device(guest)
        except (ConnectionLost, RemoteError):
            pass
        nursery.cancel_scope.cancel()
    return facts


DEVICE_INFO = struct.pack("<IIII", 16, 3, 0xFFFF_FFFF, 0xFFFF_FFFF)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=40))
def test_answers_that_are_made_up_end_in_facts_or_in_our_errors(answers: list[bytes]) -> None:
    trio.run(read_from, answers)
    trio.run(read_from, [DEVICE_INFO, *answers])


def test_a_device_that_says_it_has_everything_is_bounded() -> None:
    regions = [struct.pack("<IIIIQQ", 32, 3, n, 0, 4096, 0) for n in range(16)]
    irqs = [struct.pack("<IIII", 16, 1, n, 0xFFFF_FFFF) for n in range(16)]
    config = struct.pack("<QII", 0, 7, 4096) + b"\xff" * 4096
    facts = trio.run(read_from, [DEVICE_INFO, *regions, *irqs, config])
    assert facts is not None
    assert len(facts.regions) == len(facts.irqs) == 16
    assert facts.problems[:2] == [
        "the first 16 of 4294967295 regions are shown",
        "the first 16 of 4294967295 interrupts are shown",
    ]
    assert "\n".join(probe.lines("s", facts))


def explained(exit_code: int, *arguments: str | Path) -> str:
    result = run("probe", *arguments)
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_nobody_there(folder: Path) -> None:
    line = explained(os.EX_NOINPUT, "--socket-path", folder / "s")
    assert "is the server running" in line


def test_nobody_listens(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
        assert "no server listens" in explained(os.EX_UNAVAILABLE, "--socket-path", folder / "s")
    (folder / "f").touch()
    assert "no server listens" in explained(os.EX_UNAVAILABLE, "--socket-path", folder / "f")


def test_a_socket_that_may_not_be_used(folder: Path) -> None:
    folder.chmod(0o755)
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        with unprivileged(), pytest.raises(HostError, match="join its group") as caught:
            trio.run(probe.read, str(path), 30)
    assert "the socket is s--------- " in str(caught.value)
    assert caught.value.exit_code == os.EX_NOPERM


def test_a_path_that_is_too_long(folder: Path) -> None:
    assert "108" in explained(os.EX_USAGE, "--socket-path", "/" + "x" * 107)


def test_a_device_that_is_in_use(folder: Path) -> None:
    with served("--socket-path", folder / "s"), client(folder / "s"):
        line = explained(os.EX_UNAVAILABLE, "--socket-path", folder / "s", "--timeout", "0.2")
    assert "is a VM using it?" in line


def test_a_server_that_hangs_up(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        listener.settimeout(0)
        path = str(folder / "s")

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hang_up)
                with pytest.raises(ConnectionLost):
                    await probe.read(path, 30)

        async def hang_up() -> None:
            await trio.lowlevel.wait_readable(listener)
            listener.accept()[0].close()

        trio.run(main)


def test_a_reader_that_has_enough(folder: Path) -> None:
    """``probe | head`` is no reason for a traceback."""
    with served("--socket-path", folder / "s"):
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            result = run("probe", "--socket-path", folder / "s", stdout=write_end)
        finally:
            os.close(write_end)
    assert result.returncode == os.EX_IOERR
    assert result.stderr == ""
