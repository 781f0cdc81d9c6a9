"""The device of one's own: through the library's client, and in QEMU."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from examples.counter_device import (
    ALARM,
    BAR_SIZE,
    COUNTER,
    DOORBELL,
    IDENTITY,
    PENDING,
    REGISTER,
    SCRATCH,
    TABLE,
)
from tests.examples.example_process import EXAMPLES, environment
from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq, VfioRegion
from vfio_user_virtio.transport.client import Client, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.testbed.bed import Bed

BAR0: Final = VfioRegion.BAR0
BAR_ADDRESS: Final = 0xE000_0000
CONFIG_ADDRESS: Final = 0x8000_0000 | 3 << 11
"""The I/O port 0xcf8's value for slot 3 of bus 0."""


@contextmanager
def counter_server(folder: Path) -> Iterator[Path]:
    """The example as a process; its socket.  It must end in order."""
    path = folder / "counter.sock"
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "counter_device.py"), str(path)],
        env=environment(folder),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    with server.stdout as output:
        assert b"serving a counter" in output.readline()
        try:
            yield path
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0
    assert not path.exists()


@asynccontextmanager
async def counter_client(folder: Path) -> AsyncIterator[Client]:
    with counter_server(folder) as path:
        async with connect(path) as client:
            yield client


async def read(client: Client, register: int) -> int:
    value: int = REGISTER.unpack(await client.region_read(BAR0, register, 4))[0]
    return value


async def write(client: Client, register: int, value: int) -> None:
    await client.region_write(BAR0, register, REGISTER.pack(value))


async def test_registers(tmp_path: Path) -> None:
    async with counter_client(tmp_path) as client:
        assert (await client.region_info(BAR0)).size == BAR_SIZE
        identity = await client.region_read(VfioRegion.CONFIG, 0, 4)
        assert identity == REGISTER.pack(IDENTITY.device_id << 16 | IDENTITY.vendor_id)
        await write(client, SCRATCH, 0xCAFE_F00D)
        assert await read(client, SCRATCH) == 0xCAFE_F00D
        for _ in range(3):
            await write(client, DOORBELL, 0)
        await write(client, COUNTER, 99)
        assert await read(client, COUNTER) == 3, "COUNTER is read-only"
        assert await client.region_read(BAR0, SCRATCH, 8) == bytes(8), "registers are read whole"
        await client.reset()
        assert [await read(client, register) for register in (SCRATCH, COUNTER)] == [0, 0]


async def test_interrupt(tmp_path: Path) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    async with counter_client(tmp_path) as client:
        assert (await client.irq_info(VfioIrq.MSIX)).count == 1
        await write(client, ALARM, 2)
        await write(client, DOORBELL, 0)
        await write(client, DOORBELL, 0)
        assert await client.region_read(BAR0, PENDING, 8) == b"\1" + bytes(7), "nobody to tell"
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, (eventfd,)))
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(eventfd)
        assert os.eventfd_read(eventfd) == 1
        await write(client, DOORBELL, 0)
        await read(client, COUNTER)
        assert not select.select([eventfd], [], [], 0)[0], "the alarm is for one value"
        await client.region_write(BAR0, TABLE + 8, REGISTER.pack(0x55))
        assert await client.region_read(BAR0, TABLE + 8, 4) == REGISTER.pack(0x55)
    os.close(eventfd)


class Qtest:
    """QEMU's qtest protocol: a line per command, "OK" and perhaps a value as the answer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout

    def __call__(self, command: str) -> int:
        self._stdin.write(command + "\n")
        self._stdin.flush()
        words = self._stdout.readline().split()
        assert words[:1] == ["OK"], f"{command}: {words}"
        return int(words[1], 0) if len(words) > 1 else 0

    def config_read(self, offset: int) -> int:
        self(f"outl 0xcf8 {CONFIG_ADDRESS | offset:#x}")
        return self("inl 0xcfc")

    def config_write(self, offset: int, value: int) -> None:
        self(f"outl 0xcf8 {CONFIG_ADDRESS | offset:#x}")
        self(f"outl 0xcfc {value:#x}")


@pytest.mark.e2e
def test_in_qemu(bed: Bed, tmp_path: Path) -> None:
    """QEMU maps the BAR where its guest would have put it, and passes accesses on."""
    with counter_server(tmp_path) as path:
        device = (
            f'{{"driver":"vfio-user-pci","addr":"3","socket":{{"type":"unix","path":"{path}"}}}}'
        )
        ram = "memory-backend-memfd,id=ram,size=64M,share=on"
        argv = [*bed.qemu(), "-nodefaults", "-display", "none", "-accel", "qtest"]
        argv += ["-qtest", "stdio", "-qtest-log", "none", "-object", ram]
        argv += ["-machine", "q35,memory-backend=ram", "-device", device]
        modules = environment(tmp_path, QEMU_MODULE_DIR=str(bed.libraries / "qemu"))
        with subprocess.Popen(
            argv, env=modules, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                qtest = Qtest(process)
                identity = IDENTITY.device_id << 16 | IDENTITY.vendor_id
                assert qtest.config_read(0) == identity
                qtest.config_write(0x10, 0xFFFF_FFFF)
                assert qtest.config_read(0x10) == 0x1_0000_0000 - BAR_SIZE
                qtest.config_write(0x10, BAR_ADDRESS)
                qtest.config_write(0x04, 2)
                qtest(f"writel {BAR_ADDRESS + SCRATCH:#x} 0x12345678")
                assert qtest(f"readl {BAR_ADDRESS + SCRATCH:#x}") == 0x1234_5678
                qtest(f"writel {BAR_ADDRESS + DOORBELL:#x} 1")
                assert qtest(f"readl {BAR_ADDRESS + COUNTER:#x}") == 1
            finally:
                process.kill()
