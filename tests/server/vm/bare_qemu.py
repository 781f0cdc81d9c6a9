"""QEMUs without a guest, for tests of what is done to them from outside."""

from __future__ import annotations

import socket
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio

from vfio_user_virtio_server.vm.qmp import open_qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from tests.testbed.bed import Bed
    from vfio_user_virtio_server.vm.qmp import Qmp


def functions(buses: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `query-pci` tells of: each bus's functions, those behind bridges once they are found."""
    for bus in buses:
        for function in bus.get("devices", ()):
            yield function
            if bridge := function.get("pci_bridge"):
                yield from functions([bridge])


def decodes(buses: Iterable[dict[str, Any]], qdev_id: str) -> bool:
    """Whether that function decodes its first region; an address that is not decoded is -1."""
    return any(
        function["regions"][0]["address"] > 0
        for function in functions(buses)
        if function["qdev_id"] == qdev_id and function["regions"]
    )


async def firmware_done(qmp: Qmp) -> None:
    """Until it has let device ``vf`` decode its addresses, the last thing that it does to it.

    Asked of QEMU: the device's registers are the firmware's while that runs.
    """
    with trio.fail_after(20):
        while not decodes(cast("list[dict[str, Any]]", await qmp.execute("query-pci")), "vf"):
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
