"""A Linux guest goes from one stock QEMU to another, its NIC from one physical VF to another.

All of the product at once.  Two servers, each with a PF of its own and one of its VFs; an owner's
commands go through a real virtqueue, the guest's packets by the IOMMU.  ``migrate-vm`` drives both
QEMUs and both servers.  The guest is on the network of this host by a third VF, which has the
kernel's own driver; what it is asked meanwhile is asked from here.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.inner.nested.nested_machine import (
    ARRIVING,
    COMMAND_SECONDS,
    arrive,
    nested_machine,
)
from tests.testbed import server_process
from tests.testbed.bed import Bed
from tests.testbed.guest import KERNEL_COMPLAINTS, start
from tests.testbed.server_process import COMMAND, serve
from vfio_user_virtio.control.client import connect_control

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from tests.inner.conftest import InnerFacts
    from tests.testbed.guest import Guest

HERE: Final = os.environ.get("OTHER_PEER", "")
GUEST: Final = "10.78.0.2"
PORT: Final = 5000
BLOCK: Final = 4096
PAUSE: Final = 0.05
"""Seconds between two blocks, so that there is time for all else as well."""
START_SECONDS: Final = 120
"""For a server to start, on a machine that may be busy."""
COMPLAINTS: Final = f"dmesg | grep -E '{KERNEL_COMPLAINTS.pattern}' || :"
"""All of it is long for a serial line of such a guest."""
ENOUGH: Final = 10
"""Blocks before and after the move."""


@attrs.frozen
class End:
    """A server and a QEMU on its VF, and how both are driven."""

    folder: Path
    guest: Guest

    @property
    def qmp(self) -> str:
        return str(self.folder / "qmp")

    @property
    def control(self) -> str:
        return str(self.folder / "control")


@asynccontextmanager
async def end(
    bed: Bed, folder: Path, vf: str, pf: str, incoming: tuple[str, ...]
) -> AsyncIterator[End]:
    """`incoming`: where its guest is to come from."""
    await trio.Path(folder).mkdir()
    socket = folder / "vf.sock"
    options = ("--socket-path", str(socket), "--control-path", str(folder / "control"))
    async with serve(folder, *options, "--vf", vf, "--pf", pf, "--member", "1"):
        more = ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
        machine = nested_machine(bed, socket, *more, *incoming)
        async with start(bed, machine, folder) as guest:
            yield End(folder, guest)


class Stream:
    """A TCP connection to the guest, which sends back what it gets."""

    def __init__(self) -> None:
        self.blocks = 0
        self._more = trio.Event()
        self._ending = False

    async def run(self, stream: trio.SocketStream) -> None:
        generator = random.Random(1)
        async with stream:
            while not self._ending:
                sent = generator.randbytes(BLOCK)
                await stream.send_all(sent)
                got = bytearray()
                while len(got) < BLOCK:
                    data = await stream.receive_some(BLOCK - len(got))
                    assert data, "the guest has closed the connection"
                    got += data
                assert got == sent
                self.blocks += 1
                self._more.set()
                await trio.sleep(PAUSE)

    async def pass_more(self, blocks: int) -> None:
        """Until so many more have come back."""
        wanted = self.blocks + blocks
        with trio.fail_after(COMMAND_SECONDS):
            while self.blocks < wanted:
                self._more = trio.Event()
                await self._more.wait()

    def finish(self) -> None:
        self._ending = True


async def connect(guest: Guest) -> trio.SocketStream:
    (listener,) = await trio.open_tcp_listeners(PORT, host=HERE)
    async with listener:
        await guest.run(
            f"mkfifo /tmp/back; nc {HERE} {PORT} 0<>/tmp/back 1>&0 2>/dev/null &", COMMAND_SECONDS
        )
        return await listener.accept()


async def messages(end: End) -> dict[str, int]:
    """How many of each its QEMU has sent to its server."""
    async with connect_control(end.control) as control:
        (device,) = await control.devices()
    assert device.session is not None
    return device.session.commands


async def test_linux_moves_to_another_vf(
    inner: InnerFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "START_SECONDS", START_SECONDS)
    bed = Bed.find()
    pf1, vf1, pf2, vf2, _ = inner.functions
    async with (
        end(bed, tmp_path / "source", vf1, pf1, ARRIVING) as here,
        end(bed, tmp_path / "target", vf2, pf2, ("-incoming", "defer")) as there,
    ):
        await arrive(here.guest, GUEST)
        await here.guest.run(f"until ping -c 1 -W 1 {HERE}; do :; done", COMMAND_SECONDS)
        async with trio.open_nursery() as nursery:
            stream = Stream()
            nursery.start_soon(stream.run, await connect(here.guest))
            ping = await trio.lowlevel.open_process(
                ["ping", "-q", "-i", "0.1", GUEST], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )
            await stream.pass_more(ENOUGH)
            done = await trio.run_process(
                [
                    *(COMMAND, "migrate-vm", "--json"),
                    *("--from-qmp", here.qmp, "--from-control", here.control),
                    *("--to-qmp", there.qmp, "--to-control", there.control),
                ],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            told = done.stderr.decode()
            assert done.returncode == 0, told
            before = await messages(there)
            await stream.pass_more(ENOUGH)
            after = await messages(there)
            stream.finish()
            ping.send_signal(signal.SIGINT)
            assert ping.stdout is not None
            said = b"".join([data async for data in ping.stdout]).decode()
            await ping.wait()
        assert await here.guest.process.wait() == 0, "the source has ended"
        complaints = await there.guest.run(COMPLAINTS, COMMAND_SECONDS)
        assert "waking it up failed" not in await trio.Path(there.folder, "server.log").read_text()
    report = json.loads(done.stdout)
    assert report["failed"] == []
    assert not report["devices"][0]["logged"]
    assert "cannot tell which pages it writes, so the guest is stopped" in told
    assert after == before, "packets made messages"
    counted = re.search(r"(\d+) packets transmitted, (\d+) packets received", said)
    assert counted is not None, said
    assert "duplicates" not in said
    assert 2 * int(counted[2]) > int(counted[1]), said
    assert complaints == ""
