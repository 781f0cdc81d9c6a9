"""The device behind libvfio-user of the examples, asked by the library's client."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.examples.example_process import EXAMPLES, environment
from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq, VfioRegion
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.transport.client import connect

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.usefixtures("library")
async def test_it_adds_up_guest_memory_and_interrupts(tmp_path: Path) -> None:
    path = tmp_path / "sum.sock"
    server = subprocess.Popen(  # noqa: ASYNC220 - it is not waited for
        [sys.executable, str(EXAMPLES / "libvfio_user_device.py"), str(path)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    with server.stdout as output:
        assert b"serving" in output.readline()
        for _ in range(2):  # one client after the other
            await _use(path)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    assert not path.exists()


async def _use(path: Path) -> None:
    eventfd = os.eventfd(0)
    with GuestRam(1 << 16) as ram:
        async with connect(path) as client:
            assert await client.region_read(VfioRegion.CONFIG, 0, 4) == bytes.fromhex("3412ad50")
            await ram.map(client)
            await client.set_irqs(IrqRequest(VfioIrq.MSI, 0, 1, IrqAction.TRIGGER, (eventfd,)))
            ram.view(ram.iova + 0x100, 3)[:] = b"\x01\x02\xff"
            await client.region_write(VfioRegion.BAR0, 0, (ram.iova + 0x100).to_bytes(8, "little"))
            await client.region_write(VfioRegion.BAR0, 8, (3).to_bytes(8, "little"))
            await client.region_write(VfioRegion.BAR0, 24, bytes(4))
            assert await client.region_read(VfioRegion.BAR0, 16, 8) == (0x102).to_bytes(8, "little")
            assert select.select([eventfd], [], [], 0)[0]

            await client.region_write(VfioRegion.BAR0, 0, bytes(8))
            with pytest.raises(RemoteError, match="No such file"):
                await client.region_write(VfioRegion.BAR0, 24, bytes(4))
            await client.reset()
            assert await client.region_read(VfioRegion.BAR0, 0, 32) == bytes(32)
    os.close(eventfd)
