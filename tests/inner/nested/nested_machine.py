"""The guest of a QEMU inside the inner host: booted outside, taken there by QEMU's own migration.

Emulation inside emulation takes half a minute to boot a kernel, on an idle machine, and minutes on
one that is not.  So the guest boots outside, in a second; there it also has a device of ours, which
it forgets, and QEMU saves nothing for it.  Inside it finds the VF that is in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from tests.testbed import inner_kernel
from tests.testbed.guest import boot
from tests.testbed.machine import Machine, vfio_user_pci

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest

COMMAND_SECONDS: Final = 300
"""For a command in the guest, on a machine that may be busy."""
MEMORY_MIB: Final = 128
SAVED_FOLDER: Final = "/saved"
"""Where what `save_guest` has made is inside."""
SAVED_NAME: Final = "guest"
ARRIVING: Final = ("-incoming", f"file:{SAVED_FOLDER}/{SAVED_NAME}")


def nested_machine(bed: Bed, socket: Path, *more: str) -> Machine:
    """With a device of the server at `socket`; `more` are further arguments of QEMU."""
    return Machine(
        devices=(*vfio_user_pci(socket), *more),
        memory_mib=MEMORY_MIB,
        modules=(),
        kernel=inner_kernel.find(bed),
    )


async def save_guest(bed: Bed, socket: Path, folder: Path, saved: Path) -> None:
    """Boot it on a device that is served outside, with `folder` for its logs, and save it to
    `saved`, a folder that is there."""
    async with boot(bed, nested_machine(bed, socket), folder) as guest:
        await guest.run("echo 1 >$(readlink -f /sys/class/net/eth0/device/..)/remove")
        await guest.qmp.execute("migrate", uri=f"file:{saved / SAVED_NAME}")
        await _until(guest, "query-migrate", "completed")


async def arrive(guest: Guest, address: str) -> None:
    """Until it runs inside; then it finds its device, with an address in a /24 network."""
    await _until(guest, "query-status", "running")
    await guest.run(
        f"echo 1 >/sys/bus/pci/rescan; ip addr add {address}/24 dev eth0; ip link set eth0 up",
        COMMAND_SECONDS,
    )


async def _until(guest: Guest, question: str, status: str) -> None:
    with trio.fail_after(COMMAND_SECONDS):
        while True:
            answer = await guest.qmp.execute(question)
            assert isinstance(answer, dict)
            if answer.get("status") == status:
                return
            assert answer.get("status") != "failed", answer
            await trio.sleep(0.05)
