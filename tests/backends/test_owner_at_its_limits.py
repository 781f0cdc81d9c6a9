"""As many members and mappings as there may be; and an owner that has nothing to do."""

from __future__ import annotations

import errno
import gc
import math
import os
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.backends.member_rig import (
    LONG,
    MAC_A,
    MAC_B,
    configs,
    frame,
    guests,
    ping_pong,
    receive,
)
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import ConfigError, RemoteError
from vfio_user_virtio.protocol.dma import encode_dma_map_request
from vfio_user_virtio.protocol.header import Command, encode_command
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.member import Member

BOTH: Final = DmaAccess.READ | DmaAccess.WRITE
PAGE: Final = limits.PAGE_SIZE


def mac_of(number: int) -> bytes:
    return MAC_A[:-1] + bytes((number,))


async def drive(member: Member, task_status: trio.TaskStatus[NetDriver]) -> None:
    """A driver, with little memory, on a session of `member`."""
    with GuestRam(1 << 20) as ram:
        async with served(member, memory=ram) as client:
            await ram.map(client)
            pci = await VirtioPci.open(client)
            try:
                driver = NetDriver(pci, ram, queue_size=16, rx_buffers=8)
                await driver.start()
                task_status.started(driver)
                await trio.sleep_forever()
            finally:
                pci.close()


@pytest.mark.slow
async def test_every_member_there_can_be_in_one_switch() -> None:
    """A broadcast reaches all, and an answer only the one that it is for."""
    owner = Owner("owner")
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(owner.run)
        drivers: list[NetDriver] = []
        for number in range(1, limits.MAX_MEMBERS + 1):
            member = owner.add_member(MemberConfig(member_id=number, mac=mac_of(number)))
            drivers.append(await nursery.start(drive, member))
        first, *others = drivers
        last = others[-1]
        await first.send(frame(b"\xff" * 6, mac_of(1), b"all"))
        for driver in others:
            assert (await receive(driver)).data[14:17] == b"all"
        await last.send(frame(mac_of(1), mac_of(limits.MAX_MEMBERS), b"one"))
        assert (await receive(first)).data[14:17] == b"one"
        await trio.testing.wait_all_tasks_blocked()
        assert not any(driver.received() for driver in drivers)
        with pytest.raises(ConfigError):
            owner.add_member(MemberConfig(member_id=1, mac=MAC_B))
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_client_that_maps_page_by_page_as_often_as_it_may() -> None:
    """The one mapping too many is refused with ENOSPC, and no frame is lost over it."""
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db, count=1)
        pages = a.ram.size // PAGE
        window = 1 << 40
        more = limits.MAX_DMA_MAPS - a.member.memory.statistics().maps
        gc.collect()
        fds = len(os.listdir("/proc/self/fd"))

        def mapping(number: int) -> DmaMapping:
            return DmaMapping(window + number * PAGE, PAGE, BOTH, a.ram.fd, number % pages * PAGE)

        for number in range(more - 1):
            payload = encode_dma_map_request(mapping(number))
            message = encode_command(0, Command.DMA_MAP, payload, no_reply=True)
            await a.client.endpoint.send(message, [a.ram.fd])
        await a.client.dma_map(mapping(more - 1))
        counts = a.member.memory.statistics()
        assert (counts.maps, counts.files) == (limits.MAX_DMA_MAPS, 1)
        assert len(os.listdir("/proc/self/fd")) == fds
        with pytest.raises(RemoteError) as refused:
            await a.client.dma_map(mapping(more))
        assert refused.value.errno == errno.ENOSPC
        await ping_pong(da, db, size=9000)
        await a.client.dma_unmap(window, 1 << 40)
        await a.client.dma_map(mapping(more))
        await ping_pong(da, db)


async def test_nothing_wakes_up_while_nothing_happens() -> None:
    """Members with sessions and drivers, after traffic: no task can run, and no timer is set."""
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)
        with trio.fail_after(LONG):
            await trio.testing.wait_all_tasks_blocked(0.05)
        statistics = trio.lowlevel.current_statistics()
        assert statistics.seconds_to_next_deadline == math.inf
        assert statistics.tasks_runnable == 0
