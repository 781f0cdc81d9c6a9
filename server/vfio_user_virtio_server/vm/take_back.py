"""Take a guest back that a ``migrate-vm`` has left on its way, as that was killed.

The servers have let go by themselves: what was begun by the control interface ends with its
connection.  The QEMUs do not know that anybody is gone.  The source migrates on, and then waits in
``pre-switchover``, or has sent all and is stopped for good; the target waits for the guest, or has
it and waits for ``cont``.  Going on from there is not tried, since the devices' state has gone with
the process.  So the target is ended, and the source runs on; the network is told, as it may have
been led to the target already.

That must not happen to a guest that runs at the target.  It is refused if the target runs, and if
it may run for all one knows: when it has got all, and its monitor cannot be reached.

One thing is not as it was: `pci_state.without_intx`, and what COMMAND was before has gone with the
process as well.  INTx is turned on again where MSI-X is off.  A driver that had it off for reasons
of its own, such as a handler that masks it, is interrupted once more, which is what such do for.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.vm import pci_state, standing
from vfio_user_virtio_server.vm.control import connect_server
from vfio_user_virtio_server.vm.errors import QemuError, QemuGone
from vfio_user_virtio_server.vm.guest_pci import GuestFunction
from vfio_user_virtio_server.vm.qemu import Qemu
from vfio_user_virtio_server.vm.qmp import open_qmp
from vfio_user_virtio_server.vm.qtest import open_qtest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from vfio_user_virtio_server.vm.qtest import Forwarded


async def take_back_by(
    from_qmp: str, from_qtest: Forwarded | None, from_control: Sequence[str], to_qmp: str
) -> str:
    """As `take_back`, by the paths of the monitors and of the source's servers.

    What stands then.  Raises HostError.
    """
    async with (
        open_qmp(await dial(from_qmp), "the source's QEMU") as source,
        _reached(to_qmp) as target,
    ):
        await take_back(Qemu(source, from_qtest), target)
    for path in from_control:
        async with connect_server(path) as server:
            for device in await server.devices():
                if device.announces and device.connected:
                    await server.announce(device.name)
    return standing.BACK


@contextlib.asynccontextmanager
async def _reached(path: str) -> AsyncIterator[Qemu | None]:
    """The target, if anybody listens there, and not only what forwards its socket."""
    async with contextlib.AsyncExitStack() as stack:
        target: Qemu | None = None
        try:
            opened = open_qmp(await dial(path), "the target's QEMU")
            target = Qemu(await stack.enter_async_context(opened))
        except HostError as error:
            ended = error.exit_code in (os.EX_NOINPUT, os.EX_UNAVAILABLE)
            if not ended and not isinstance(error, QemuGone):
                raise
        yield target


async def take_back(source: Qemu, target: Qemu | None) -> None:
    """End `target`, None if it cannot be reached; let the guest run at `source`.

    Raises QemuError; before anything was changed if the guest is at the target.
    """
    stopped = await source.status() != "running"
    if target is not None:
        if (status := await target.status()) == "running":
            raise QemuError(f"{target.name} is {status}: the guest is there, so end the source")
        await target.quit()
    elif stopped and await source.migration() == "completed":
        raise QemuError(
            f"{source.name} has sent all, and the target cannot be reached: see that it has "
            "ended, then say cont to the source"
        )
    if stopped:
        await _turn_intx_on(source)
    await source.give_up()
    await source.run()


async def _turn_intx_on(source: Qemu) -> None:
    devices = (await source.facts()).devices
    async with open_qtest(source.qmp, source.forwarded) as qtest:
        for ident in devices:
            function = await GuestFunction.find(source.qmp, qtest, ident)
            await pci_state.with_intx(function, await pci_state.read_config(function))
