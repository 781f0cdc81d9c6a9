"""A guest that moves from one physical VF to another: all of the product at once.

The kernel's VFIO holds the VFs and their PF; our sessions serve the VFs, our owner has them
stopped, read and written by administration commands, and the driver of the guest, whose memory is
copied, goes on where it was.  Its peer is a third VF on the same switch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import trio

from tests.backends.member_rig import frame, receive
from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.backends.vfio.physical import (
    PhysicalConfig,
    VfConfig,
    physical_functions,
)
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.testing.guest_move import MovableGuest, Place
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.movable_ram import MovableRam
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.device import Device

SOURCE, PF, TARGET, PEER = 0, 1, 4, 5
RAM: Final = 4 << 20
BUFFERS: Final = 16


@contextlib.asynccontextmanager
async def place(device: Device) -> AsyncIterator[Place]:
    with GuestRam(RAM) as memory:
        async with served(device, memory=memory) as client:
            made = Place(client, memory)
            await made.map()
            yield made


async def ping_pong(guest: NetDriver, peer: NetDriver, rounds: int) -> None:
    here, there = (await guest.config()).mac, (await peer.config()).mac
    for number in range(rounds):
        for sender, receiver, target, source in (
            (guest, peer, there, here),
            (peer, guest, here, there),
        ):
            sent = frame(target, source, number.to_bytes(4, "little"))
            await sender.send(sent)
            assert (await receive(receiver)).data == sent


async def test_a_guest_moves_there_and_back(inner: InnerFacts, way: str) -> None:
    functions = [PciAddress.parse(address) for address in inner.functions]
    config = PhysicalConfig(
        vfs=tuple(
            VfConfig(address=functions[index], member_id=number)
            for number, index in enumerate((SOURCE, TARGET, PEER), 1)
        ),
        pf=functions[PF],
        way=Way[way.upper()],
    )
    async with (
        physical_functions(config) as devices,
        place(devices[0]) as here,
        place(devices[1]) as there,
        served(devices[2]) as peer_client,
    ):
        with GuestRam(RAM) as peer_ram, MovableRam(RAM) as ram:
            await peer_ram.map(peer_client)
            guest = await MovableGuest.open(here, ram)
            driver = NetDriver(guest.pci, guest.ram, rx_buffers=BUFFERS)
            peer = NetDriver(await VirtioPci.open(peer_client), peer_ram, rx_buffers=BUFFERS)
            await driver.start()
            await peer.start()
            with trio.fail_after(120):
                await ping_pong(driver, peer, 5)
                for target in (there, here):
                    await guest.move_to(target)
                    await ping_pong(driver, peer, 5)
                    left = here if target is there else there
                    await left.client.reset()
            guest.pci.close()
            peer.pci.close()
