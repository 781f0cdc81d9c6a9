"""QEMUs without a guest, for tests of what is done to them from outside."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio_server.vm.qmp import open_qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.testbed.bed import Bed
    from vfio_user_virtio_server.vm.qmp import Qmp

DECODED: Final = re.compile(r'"qdev_id": "vf".*?"regions": \[\{[^}]*"address": [1-9]', re.DOTALL)
"""Of a function in what `query-pci` says; an address that is not decoded is -1."""


async def firmware_done(qmp: Qmp) -> None:
    """Until it has let device ``vf`` decode its addresses, the last thing that it does to it.

    Asked of QEMU: the device's registers are the firmware's while that runs.
    """
    with trio.fail_after(20):
        while not DECODED.search(json.dumps(await qmp.execute("query-pci"))):
            pass


@asynccontextmanager
async def bare_qemu(bed: Bed, *options: str, name: str = "qemu") -> AsyncIterator[Qmp]:
    """A q35 machine, stopped at its first instruction; its monitor."""
    ours, theirs = socket.socketpair()
    with theirs:
        argv = [
            *bed.qemu(),
            *("-no-user-config", "-nodefaults", "-display", "none", "-S"),
            *("-machine", "q35", "-m", "64M", "-accel", "tcg"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
            *("-object", "monitor-qmp,id=monitor,chardev=qmp"),
            *options,
        ]
        process = await trio.lowlevel.open_process(
            argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    try:
        async with open_qmp(ours, name) as qmp:
            yield qmp
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
