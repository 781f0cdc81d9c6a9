"""Starting, watching and ending the program behind a passt uplink.

passt itself is not installed everywhere; what stands in for it here is a real program that takes
the same options and speaks the same framing on the inherited socket.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.switch_ports import FakeAlarm, MemberPort, ethernet, mac
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.uplinks.passt import PasstUplink
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ECHO = """
import signal, socket
at = sys.argv.index("--fd")
peer = socket.socket(fileno=int(sys.argv[at + 1]))
assert sys.argv[at + 2 :] == ["--foreground", "--quiet", "--option", "x"]
print("ready when you are", file=sys.stderr, flush=True)
while data := peer.recv(70_000):
    peer.sendall(data)
    if b"stop now" in data:
        sys.exit(3)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("I stay", file=sys.stderr, flush=True)
while True:
    time.sleep(60)
"""


class Net:
    def __init__(self, folder: Path, program: str) -> None:
        path = folder / "passt"
        path.write_text(f"#!{sys.executable}\nimport os, sys\n{program}")
        path.chmod(0o755)
        self.switch = Switch(alarm=FakeAlarm())
        self.a = MemberPort(self.switch, "a")
        options = ("--option", "x")
        self.uplink = PasstUplink(self.switch, program=str(path), options=options)
        self.switch.plug(self.a, self.a)
        self.switch.plug_uplink(self.uplink)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  # another process has no event of ours to set
            await trio.sleep(0.002)


def children() -> str:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read()


async def test_frames_both_ways_and_an_end_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(tmp_path, ECHO)
    before = children()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await until(lambda: net.uplink.up)
        frame = ethernet(mac(1), mac(0), bytes(1_000))
        assert net.a.send(frame)
        await until(lambda: net.a.received)
        assert net.a.take() == [frame]
        nursery.cancel_scope.cancel()
    assert children() == before
    assert "passt: ready when you are" in caplog.text


async def test_one_that_ends_later_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfio_user_virtio.backends.software.uplinks import passt

    monkeypatch.setattr(passt, "_STARTED_SECONDS", 0.0)
    net = Net(tmp_path, ECHO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await until(lambda: net.uplink.up)
        net.a.send(ethernet(mac(1), mac(0), b"stop now"))
        await until(lambda: "status 3" in caplog.text)
        net.a.take()
        await until(lambda: net.uplink.up)
        net.a.send(ethernet(mac(1), mac(0), b"once more"))
        await until(lambda: net.a.received)
        nursery.cancel_scope.cancel()
    assert "passt ended with status 3, saying: ready when you are" in caplog.text


async def test_one_that_ends_at_once_is_an_error_with_its_words(tmp_path: Path) -> None:
    net = Net(tmp_path, "sys.exit('no interface with a default route')")
    with pytest.raises(HostError, match="status 1, saying: no interface with a default route"):
        await net.uplink.run()


async def test_one_that_does_not_want_to_end_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(tmp_path, STUBBORN)
    before = children()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.uplink.run)
        await until(lambda: "I stay" in caplog.text)
        nursery.cancel_scope.cancel()
    assert children() == before


def test_no_passt() -> None:
    with pytest.raises(HostError, match=r"not-there is not there.*install passt"):
        PasstUplink(Switch(alarm=FakeAlarm()), program="not-there")


async def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    net = Net(tmp_path, "")
    (tmp_path / "passt").write_text("#!/no/such/interpreter\n")
    with pytest.raises(HostError, match="cannot start"):
        await net.uplink.run()
