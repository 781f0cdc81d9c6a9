"""Guest memory that the client takes away and gives back while the device works in it by messages.

QEMU does that when the guest's machine changes: RAM is unmapped whole and mapped anew, in pieces,
whatever the device has under way.  None of it is the driver's doing.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.backends.member_rig import (
    BROADCAST,
    LONG,
    MAC_A,
    MAC_B,
    configs,
    frame,
    guests,
    ping_pong,
    receive,
    until,
)
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from tests.backends.member_rig import Guest

RAM: Final = 1 << 22
OUTSIDE: Final = 1 << 40


class Remapping:
    """The device's way to its guest's memory, which is unmapped under access number `left`.

    `refuses`: the client had the access before, and answers that there is no memory.
    """

    def __init__(self, guest: Guest, *, refuses: bool) -> None:
        access = guest.member._queues.access
        assert access is not None
        self._access = access
        self._guest = guest
        self.left = 0
        self._refuses = refuses
        self.unmapped = False

    async def _look(self) -> None:
        self.left -= 1
        if self.left == 0:
            await self._guest.ram.unmap(self._guest.client)
            self.unmapped = True
            if self._refuses:
                raise RemoteError(errno.ENODEV, "DMA_READ was refused")

    async def read(self, iova: int, size: int) -> bytes:
        await self._look()
        return await self._access.read(iova, size)

    async def write(self, iova: int, data: bytes) -> None:
        await self._look()
        await self._access.write(iova, data)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("at", range(1, 16))
async def test_memory_that_goes_under_an_access(at: int, refuses: bool) -> None:
    """Whatever the device had begun: it goes on with the memory that it is given next."""
    async with guests(*configs(MAC_A, MAC_B), remote=True, ram_size=RAM) as (a, b):
        da, db = a.driver(queue_size=16, rx_buffers=4), b.driver()
        remapping = Remapping(a, refuses=refuses)
        a.member._queues.access = remapping  # type: ignore[assignment]  # has what is used of it
        await db.start()
        await da.start()
        await trio.testing.wait_all_tasks_blocked()
        remapping.left = at
        await da.send(frame(MAC_B, MAC_A, b"sent"))
        await db.send(frame(MAC_A, MAC_B, b"comes in"))
        await until(lambda: remapping.unmapped)
        await trio.testing.wait_all_tasks_blocked()
        await a.ram.map(a.client, remote=True, step=RAM // 4)
        assert (await receive(db)).data[14:18] == b"sent"
        assert (await receive(da)).data[14:22] == b"comes in"
        await da.flush()
        assert not await a.pci.status() & Status.DEVICE_NEEDS_RESET
        assert a.member.statistics().driver_errors == 0


async def test_frames_that_come_in_while_memory_is_away() -> None:
    """With no kick of the driver between, as it knows nothing of it."""
    async with guests(*configs(MAC_A, MAC_B), remote=True, ram_size=RAM) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        for _ in range(3):
            await ping_pong(da, db)
            await b.ram.unmap(b.client)
            await da.send(frame(MAC_B, MAC_A, b"meanwhile"))
            await da.flush()
            await trio.testing.wait_all_tasks_blocked()
            await b.ram.map(b.client, remote=True, step=RAM // 4)
            assert (await receive(db)).data[14:23] == b"meanwhile"
        assert b.member.statistics().driver_errors == 0


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_ring_that_is_nowhere_is_held_against_the_driver(refuses: bool) -> None:
    """Also when memory had been changed before it notified, and where the client mapped nothing."""
    async with guests(*configs(MAC_A), remote=True, ram_size=RAM) as (a,):
        driver = a.driver()
        await driver.start()
        await a.ram.unmap(a.client)
        await a.ram.map(a.client, remote=True)
        await driver.send(frame(BROADCAST, MAC_A))
        await driver.flush()
        if refuses:  # it is mapped, but the client has no memory there
            await a.client.dma_map(DmaMapping(OUTSIDE, 1 << 16, DmaAccess(3)))
        await a.pci.negotiate(driver.features)
        await a.pci.write(Register.CONFIG_MSIX_VECTOR, 0)
        ring = driver.queue(1).ring
        await a.pci.enable_queue(1, ring, vector=2, instead={Register.QUEUE_DRIVER: OUTSIDE})
        await a.pci.driver_ok()
        await driver.kick(1)
        with trio.fail_after(LONG):
            await until(lambda: a.member.statistics().driver_errors == 1)
        assert await a.pci.status() & Status.DEVICE_NEEDS_RESET
