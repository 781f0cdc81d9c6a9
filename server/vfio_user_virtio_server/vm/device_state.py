"""A device's state, its own and that of its PCI function, out of one VM and into the other.

These are what the steps of a move do for one device.  What does not need the result of another is
done at the same time: the guest waits for most of it, and whoever moves it for the rest.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.preflight import Preflight
from vfio_user_virtio_server.vm import pci_state
from vfio_user_virtio_server.vm.guest_pci import GuestFunction
from vfio_user_virtio_server.vm.together import all_of, both

if TYPE_CHECKING:
    from vfio_user_virtio_server.vm.move import MovedDevice
    from vfio_user_virtio_server.vm.pci_state import PciState
    from vfio_user_virtio_server.vm.qemu import Qemu
    from vfio_user_virtio_server.vm.qtest import Qtest


async def look(one: MovedDevice, source: Qemu, qtest: Qtest) -> list[str]:
    """Find its function at the source; why it cannot be taken, or would not be at the target.

    Raises HostError.
    """

    async def find() -> PciState:
        one.function = await GuestFunction.find(source.qmp, qtest, one.ident)
        async with source.standing_still() if one.function.by_ports else nullcontext():
            one.layout = await pci_state.read_config(one.function)
        return one.layout

    async def compare() -> list[str]:
        there, here = await both(
            partial(one.target.server.image, one.target.device),
            partial(one.source.server.image, one.source.device),
        )
        fit = Preflight()
        fit.target_saves_untrusted(there)
        try:
            fit.source_saves_untrusted(here)
        except HostError as error:
            return [str(error)]
        return []

    layout, problems = await both(find, compare)
    return [*layout.refusals(), *problems]


async def find_there(one: MovedDevice, target: Qtest) -> None:
    """Find the function at the target, where the guest is not yet.

    Raises QemuError if it is not of the same kind.
    """
    assert one.function is not None
    assert one.layout is not None
    one.there = GuestFunction(target, one.function.way)
    await one.there.number_bridges()
    one.fresh = await pci_state.compare(one.there, one.layout)


async def prepare(one: MovedDevice) -> None:
    """Log what it writes from here on, and give the target what it is by now.

    Most of that is still so in the end, and an owner takes the less time for what it knows.  Raises
    HostError.
    """

    async def begin() -> None:
        if one.logged:
            await one.source.server.start_log(one.source.device)
        one.first = await one.source.server.first_image(one.source.device)

    await all_of((begin, partial(one.target.server.expect, one.target.device)))
    await one.target.server.load(one.target.device, one.first)


async def stop(one: MovedDevice) -> None:
    """Raises HostError."""
    await one.source.server.stop(one.source.device)


async def save(one: MovedDevice) -> None:
    """What the device is and has written, and its function, which leaves INTx alone from here on.

    What comes for the guest waits at the target from now, if it can be led there.  Raises
    HostError.
    """
    await all_of((lambda: _save_device(one), lambda: _save_pci(one), lambda: _announce(one)))


async def _save_device(one: MovedDevice) -> None:
    one.rest = await one.source.server.final_image(one.source.device)
    if one.logged:
        one.written = await one.source.server.take_log(one.source.device)


async def _save_pci(one: MovedDevice) -> None:
    assert one.function is not None
    assert one.layout is not None
    one.pci = await pci_state.capture(one.function, one.layout)
    await pci_state.without_intx(one.function, one.pci)


async def _announce(one: MovedDevice) -> None:
    if one.announced:
        await one.target.server.announce(one.target.device)


async def load(one: MovedDevice) -> None:
    """The rest of what the device is; all takes effect when it is let run.  Raises HostError."""
    await one.target.server.load(one.target.device, one.rest)


async def restore_pci(one: MovedDevice) -> None:
    """Raises QemuError."""
    assert one.pci is not None
    assert one.there is not None
    assert one.fresh is not None
    await pci_state.restore(one.there, one.pci, one.fresh)
