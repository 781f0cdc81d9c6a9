"""A member outlives its sessions: clients come, vanish and fail, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.member_rig import (
    LONG,
    MAC_A,
    MAC_B,
    MAC_C,
    configs,
    frame,
    guests,
    nothing_comes,
    ping_pong,
    receive,
)
from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from tests.backends.member_rig import Guest
    from vfio_user_virtio.backends.software.member import Member

BOTH = DmaAccess.READ | DmaAccess.WRITE


def held() -> tuple[int, int]:
    """Fds, and mappings of guest memory, of this process."""
    gc.collect()  # the guest's own half is full of cycles
    return (
        len(os.listdir("/proc/self/fd")),
        Path("/proc/self/maps").read_text().count("/memfd:guest-ram"),
    )


async def short_life(member: Member, peer: NetDriver, *, remote: bool, vanish: bool) -> None:
    """One client of `member`: connects, moves frames, and goes, in mid-traffic if `vanish`."""
    with GuestRam(1 << 22) as ram:
        try:
            async with served(member, memory=ram) as client:
                await ram.map(client, remote=remote)
                pci = await VirtioPci.open(client)
                try:
                    driver = NetDriver(pci, ram, rx_buffers=8)
                    await driver.start()
                    await ping_pong(driver, peer, count=2)
                    if vanish:
                        for _ in range(20):
                            await peer.send(frame(MAC_A, MAC_B))
                            await driver.send(frame(MAC_B, MAC_A))
                        client.close()
                    else:
                        await driver.stop()
                finally:
                    pci.close()
        except ConnectionLost:
            assert vanish


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("vanish", [False, True])
async def test_twenty_clients_one_after_the_other(*, remote: bool, vanish: bool) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        a.client.close()
        peer = b.driver()
        await peer.start()
        await a.client.lost.wait()
        await trio.testing.wait_all_tasks_blocked()
        counts = set()
        for _ in range(20):
            with trio.fail_after(LONG):
                await short_life(a.member, peer, remote=remote, vanish=vanish)
            while not await nothing_comes(peer):
                pass
            counts.add(held())
        assert len(counts) == 1
        assert a.member.memory.statistics().maps == 0


async def page_by_page(guest: Guest, window: int, iova: int, pages: int) -> list[tuple[int, int]]:
    """Map `pages` of RAM at `iova` again in reversed order at `window`, as a vIOMMU might.

    The pieces of the memory at `iova`, as (IOVA in the window, bytes), in order.
    """
    offset = iova - guest.ram.iova
    pieces = []
    for page in range(pages):
        at = window + (pages - 1 - page) * PAGE_SIZE
        await guest.client.dma_map(
            DmaMapping(at, PAGE_SIZE, BOTH, guest.ram.fd, offset + page * PAGE_SIZE)
        )
        pieces.append((at, PAGE_SIZE))
    return pieces


async def test_buffers_that_an_iommu_maps_for_the_time_of_one_frame() -> None:
    async with guests(*configs(MAC_A, MAC_B, mtu=9000)) as (a, b):
        da, db = a.driver(), b.driver(rx_buffer_size=16384)
        await da.start()
        await db.start()
        window = 1 << 47
        buffer = a.ram.allocate(3 * PAGE_SIZE, align=PAGE_SIZE)
        for number in range(20):
            sent = frame(MAC_B, MAC_A, random.Random(number).randbytes(9000))
            buffer.memory[: 12 + len(sent)] = bytes(12) + sent
            pieces = await page_by_page(a, window, buffer.iova, 3)
            pieces[-1] = (pieces[-1][0], 12 + len(sent) - 2 * PAGE_SIZE)
            queue = da.queue(1)
            queue.add(a.ram.allocate(0), readable=pieces)
            if queue.publish():
                await da.kick(1)
            assert (await receive(db)).data == sent
            await da.flush()
            await a.client.dma_unmap(window, 3 * PAGE_SIZE)
        assert not await a.pci.status() & Status.DEVICE_NEEDS_RESET


async def test_rings_and_buffers_scattered_over_pages() -> None:
    """Every page of RAM is seen through a window in which neighbours are strangers."""
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        await a.ram.unmap(a.client)
        ram = a.ram
        # The same IOVAs, but half of the pages come without an fd: no ring is in one piece.
        for page in range(512):
            at = page * PAGE_SIZE
            fd = ram.fd if page % 2 else None
            await a.client.dma_map(DmaMapping(ram.iova + at, PAGE_SIZE, BOTH, fd, at if fd else 0))
        da, db = a.driver(queue_size=256, rx_buffers=16), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)
        await ping_pong(da, db, size=9000)


async def test_an_unmap_ladder_up_to_2_64_and_the_map_that_follows() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        for _ in range(3):
            start = 0
            for bit in range(31, 64):
                await a.client.dma_unmap(start, (1 << bit) - start)
                start = 1 << bit
            await a.client.dma_unmap(start, U64_END - start)
            assert a.member.memory.statistics().maps == 0
            await a.ram.map(a.client, step=64 * PAGE_SIZE)
            await ping_pong(da, db)


async def test_a_refused_mapping_changes_nothing_for_the_traffic() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        unsealed = os.memfd_create("guest-ram")
        os.ftruncate(unsealed, PAGE_SIZE)
        for mapping in (
            DmaMapping(a.ram.iova, PAGE_SIZE, BOTH, a.ram.fd, 0),
            DmaMapping(0, PAGE_SIZE, BOTH, a.ram.fd, a.ram.size),
            DmaMapping(0, PAGE_SIZE, BOTH, unsealed, 0),
        ):
            with pytest.raises(RemoteError):
                await a.client.dma_map(mapping)
        os.close(unsealed)
        with pytest.raises(RemoteError):
            await a.client.dma_unmap(a.ram.iova, PAGE_SIZE)
        await ping_pong(da, db)


REGION_SIZES = {1: 0x1000, 4: 0x4000, 7: 0x1000}
ACCESS = st.tuples(
    st.sampled_from([1, 4, 4, 4, 4, 7, 7]),
    st.integers(0, 63) | st.integers(0, 255) | st.integers(0, 0x3FF0),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0, 1, 2, 3, 4, 0xF, 0x8000, 0xFFFF]) | st.integers(0, 2**64 - 1),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACCESS, max_size=60))
def test_any_register_writes_at_all_harm_nobody(accesses: list[tuple[int, int, int, int]]) -> None:
    async def main() -> None:
        async with guests(*configs(MAC_A, MAC_B, queue_pairs=2)) as (a, b):
            da, db = a.driver(), b.driver()
            await da.start()
            await db.start()
            for region, place, size, value in accesses:
                offset = place % REGION_SIZES[region] & -size
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                await a.client.region_write(region, offset, data)
                assert len(await a.client.region_read(region, offset, size)) == size
            await a.client.reset()
            await da.start()
            await ping_pong(da, db, count=1)

    trio.run(main)


async def test_one_sessions_failure_leaves_the_others_alone() -> None:
    async with guests(*configs(MAC_A, MAC_B, MAC_C)) as (a, b, c):
        db, dc = b.driver(), c.driver()
        await db.start()
        await dc.start()
        generator = random.Random(7)
        a.client.close()
        for size in (1, 15, 16, 17, 40, 200, 5000):
            await trio.testing.wait_all_tasks_blocked()
            async with served(a.member) as client:
                await client.endpoint.send(generator.randbytes(size))
                await ping_pong(db, dc, to=MAC_C, sender=MAC_B)
                client.close()


async def test_the_next_clients_memory_is_left_alone_until_its_driver_is_ready() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)
        before = bytes(a.ram.view(a.ram.iova, a.ram.size))
        a.client.close()
        await trio.testing.wait_all_tasks_blocked()
        with GuestRam(a.ram.size) as ram:
            ram.view(ram.iova, ram.size)[:] = before
            async with served(a.member, memory=ram) as client:
                await ram.map(client)
                await db.send(frame(MAC_A, MAC_B, b"not for you"))
                await db.flush()
                await trio.testing.wait_all_tasks_blocked()
                assert bytes(ram.view(ram.iova, ram.size)) == before
