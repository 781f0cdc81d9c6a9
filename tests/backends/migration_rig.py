"""A guest between two members: stopped on one, let run on the other, in the same memory.

Source and target are members of one owner, as is the guest's peer, so that one switch joins them.
What an orchestrator does around it is done by hand: the target's configuration space is set up, and
the driver's eventfds are armed there.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import attrs

from tests.backends.member_rig import MAC_A, MAC_B, MAC_C, configs
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq
from vfio_user_virtio.limits import MAX_MSG_FDS
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import CAP_MSIX, MSIX_ENABLE, VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.transport.client import Client


@attrs.define
class Place:
    """A member, and its client."""

    member: Member
    client: Client
    pci: VirtioPci


@attrs.define
class Rig:
    """`here` is where the guest is; `peer` is whom it talks to."""

    here: Place
    there: Place
    driver: NetDriver
    peer: NetDriver

    async def migrate(self, *, private: bool = True) -> None:
        """Move the guest, and reset what it left."""
        source, target = self.here, self.there
        assert await source.member.mode.stop()
        assert await target.member.mode.stop()
        target.member.mode.set_parts_untrusted(source.member.mode.parts())
        if private:
            target.member.mode.set_private_state_untrusted(source.member.mode.private_state())
        await self.plug_into(target)
        target.member.mode.resume()
        await source.client.reset()
        await source.pci.set_up()
        self.here, self.there = target, source

    async def plug_into(self, place: Place) -> None:
        """What the guest's machine restores beside the device: MSI-X, and its eventfds."""
        pci, before = place.pci, self.driver.pci
        control = pci.pci_capabilities[CAP_MSIX] + 2
        await pci.config_write(control, await pci.config_read(control, 2) | MSIX_ENABLE, 2)
        pci.features, pci._notify_off = before.features, before._notify_off
        pci._interrupts, before._interrupts = before._interrupts, []
        eventfds = tuple(interrupt.fd for interrupt in pci._interrupts)
        for start in range(0, len(eventfds), MAX_MSG_FDS):
            batch = eventfds[start : start + MAX_MSG_FDS]
            await place.client.set_irqs(
                IrqRequest(VfioIrq.MSIX, start, len(batch), IrqAction.TRIGGER, eventfds=batch)
            )
        self.driver.pci = pci


@contextlib.asynccontextmanager
async def rig(
    *, remote: bool = False, start: bool = True, ram_size: int = 32 << 20, **options: object
) -> AsyncIterator[Rig]:
    """A guest that is MAC_A to its peer MAC_B; both drivers are started if `start`.

    `options` with a name of the driver's go to it, others to both members' configuration.
    """
    of_driver = {
        name: options.pop(name)
        for name in ("features", "max_pairs", "rx_buffers", "rx_buffer_size", "segment")
        if name in options
    }
    owner = Owner("owner")
    a, b, c = configs(MAC_A, MAC_B, MAC_C, **options)
    async with ungrouped_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        nursery.start_soon(owner.run)

        async def place(member: Member, ram: GuestRam) -> Place:
            client = await stack.enter_async_context(served(member, memory=ram))
            await ram.map(client, remote=remote)
            pci = await VirtioPci.open(client)
            stack.callback(pci.close)
            return Place(member, client, pci)

        guest_ram = stack.enter_context(GuestRam(ram_size))
        peer_ram = stack.enter_context(GuestRam(ram_size))
        here = await place(owner.add_member(a), guest_ram)
        peer = await place(owner.add_member(b), peer_ram)
        there = await place(owner.add_member(c), guest_ram)
        driver = NetDriver(here.pci, guest_ram, **of_driver)  # type: ignore[arg-type]  # passed on
        made = Rig(here, there, driver, NetDriver(peer.pci, peer_ram))
        if start:
            await made.driver.start()
            await made.peer.start()
        yield made
        nursery.cancel_scope.cancel()
