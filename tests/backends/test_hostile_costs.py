"""What a hostile driver can make the process spend: memory and time in bounds, turns for others."""

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.backends.member_rig import MAC_A, MAC_B, configs, frame, guests, until, without
from tests.backends.test_member_uplink_side import come_in, wired
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import first_bytes
from vfio_user_virtio.limits import MIB
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Buffer
    from vfio_user_virtio.testing.driver_queue import Ring

NEXT, WRITE, INDIRECT = 1, 2, 4
PIECES: Final = limits.MAX_CHAIN_DESCRIPTORS


def long_chain(
    ring: Ring, index: int, buffer: int, size: int, flags: int = 0, *, pieces: int = PIECES
) -> None:
    """Descriptor `index` leads to a table of so many pieces, all the same."""
    table = ring.ram.allocate(16 * pieces)
    for piece in range(pieces):
        following = (flags | NEXT, piece + 1) if piece + 1 < pieces else (flags, 0)
        struct.pack_into("<QIHH", table.memory, 16 * piece, buffer, size, *following)
    ring.set_descriptor(index, table.iova, 16 * pieces, INDIRECT)


def offer(ring: Ring, *heads: int) -> None:
    for head in heads:
        ring.set_avail(ring.avail_idx, head)
        ring.avail_idx = ring.avail_idx + 1 & 0xFFFF


async def test_a_command_of_a_gibibyte_is_not_copied_whole() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver()
        await driver.start()
        queue = driver.control_index
        ring = driver.queue(queue).ring
        used = ring.used_idx
        long_chain(ring, 0, guest.ram.allocate(MIB).iova, MIB)
        offer(ring, 0)
        tracemalloc.start()
        try:
            await driver.kick(queue)
            await until(lambda: ring.used_idx == used + 1)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()


async def test_receive_buffers_of_a_gibibyte_are_not_copied_whole() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver()
        await driver.start(rx=False)
        await driver.control.set_rx_mode("promisc", False)  # now the head of each frame is read
        ring = driver.queue(0).ring
        buffer = guest.ram.allocate(MIB).iova
        ring.set_descriptor(0, guest.ram.allocate(16).iova, 1, WRITE)
        long_chain(ring, 1, buffer, MIB, WRITE, pieces=1000)  # a readv takes no more than 1,024
        offer(ring, 0, 1)
        sent = frame(MAC_A, MAC_B, b"small")
        tracemalloc.start()
        try:
            assert come_in(guest.member, sent)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
        assert bytes(guest.ram.view(buffer, len(sent) + 11)[11:]) == sent


@pytest.mark.parametrize("queue", [1, 2])
async def test_chains_of_very_many_pieces_take_turns(queue: int) -> None:
    """One pass of a member is short, whatever its driver sends or commands."""
    async with guests(*configs(MAC_A)) as (guest,):
        wired(guest)
        driver = guest.driver()
        await driver.start()
        ring = driver.queue(queue).ring
        before = ring.used_idx
        long_chain(ring, 0, guest.ram.allocate(64).iova, 1)
        offer(ring, *[0] * ring.size)
        guest.member.kick(queue)
        guest.member.work()
        in_one_pass = ring.used_idx - before
        assert 0 < in_one_pass * PIECES <= limits.WORK_BUDGET * limits.PIECES_OF_WORK
        await until(lambda: ring.used_idx - before == ring.size)


@pytest.mark.parametrize("features", [without(), without(Feature.MRG_RXBUF)])
async def test_buffers_of_very_many_pieces_take_turns(features: int) -> None:
    """One pass of an uplink is short, whatever buffers it reads into."""
    async with guests(*configs(MAC_A)) as (guest,):
        wire = wired(guest)
        driver = guest.driver(features=features)
        await driver.start(rx=False)
        ring = driver.queue(0).ring
        long_chain(ring, 0, guest.ram.allocate(64).iova, 64, WRITE, pieces=PIECES - 2)
        offer(ring, *[0] * ring.size)
        guest.member.kick(0)
        guest.member.work()
        resumed = False

        def resume() -> None:
            nonlocal resumed
            resumed = True

        wire.resume = resume  # type: ignore[method-assign]  # what the switch tells an uplink
        came = 0
        while came < ring.size:
            in_one_pass = 0
            while came + in_one_pass < ring.size and come_in(guest.member, frame(MAC_A, MAC_B)):
                in_one_pass += 1
            assert in_one_pass * PIECES <= limits.MAX_RECEIVED_PIECES + 2 * PIECES
            came += in_one_pass
            resumed = False
            guest.member._switch.wait_for_room(wire, guest.member)
            await trio.testing.wait_all_tasks_blocked()
            assert resumed or came == ring.size
        assert ring.used_idx == ring.size


@pytest.mark.parametrize("queue", [1, 2])
async def test_kicks_and_unmaps_in_one_read_take_turns(queue: int) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with guests(*configs(MAC_A)) as (guest,), trio.open_nursery() as nursery:
        driver = guest.driver()
        await driver.start()
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        before = turns
        for _ in range(100):
            guest.member.kick(queue)
            await guest.member.dma_unmap(1 << 60, 4096)
        assert turns - before > 50
        assert not await guest.pci.status() & Status.DEVICE_NEEDS_RESET
        nursery.cancel_scope.cancel()


def test_first_bytes_stops_where_it_has_enough() -> None:
    parts: list[Buffer] = [b"ab", b"", memoryview(b"cdef"), b"gh"]
    assert [first_bytes(parts, size) for size in (0, 1, 2, 3, 6, 7, 8, 9)] == [
        b"abcdefgh"[:size] for size in (0, 1, 2, 3, 6, 7, 8, 9)
    ]
    assert first_bytes((), 5) == b""
