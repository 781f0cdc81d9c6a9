"""Attach your own QEMU: the options that the script prints give a guest a working device."""

from __future__ import annotations

import signal
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.e2e import traffic
from tests.examples.example_process import EXAMPLES, shell_words
from tests.testbed.guest import boot
from tests.testbed.machine import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

SCRIPT: Final = EXAMPLES / "attach_qemu.sh"


@asynccontextmanager
async def attached(netns: Netns, uplink: str, socket: Path) -> AsyncIterator[str]:
    """The script runs; what it printed."""
    process = await trio.lowlevel.open_process(
        netns.wrap([str(SCRIPT), uplink, str(socket)]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    output = b""
    try:
        while b" ready: " not in output:
            data = await process.stdout.receive_some()
            assert data, output.decode()
            output += data
        yield output.decode()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def options(output: str) -> list[str]:
    """QEMU's options: the lines that are indented by four spaces, as a shell reads them."""
    lines = [line for line in output.splitlines() if line.startswith("    -")]
    return shell_words("\n".join(lines))


@pytest.mark.e2e
@pytest.mark.slow
async def test_guest_on_the_printed_options(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    await traffic.add_tap(netns)
    socket = tmp_path / "vm.sock"
    async with attached(netns, f"tap:{traffic.TAP}", socket) as output:
        for warning in ("share=on  ", "x-msg-timeout  ", "Hot-unplug  ", "Migration  "):
            assert f"\n{warning}" in output
        machine = Machine(devices=tuple(options(output)), shared_memory=False, memory_mib=1024)
        async with boot(bed, machine, tmp_path / "guest") as guest:
            await traffic.configure(guest)
            await traffic.check_ping(guest, netns)
    assert not socket.exists()


def test_usage_of_an_uplink_that_is_none(tmp_path: Path) -> None:
    """What is wrong with the arguments, the server says."""
    argv = [str(SCRIPT), "bridge:br0", str(tmp_path / "vm.sock")]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 64
    assert "'bridge:br0' is not an uplink" in done.stderr
