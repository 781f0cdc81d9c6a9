"""What a broken or hostile driver can do to a member: nothing but to itself.

After each attack the device either asks for a reset (DEVICE_NEEDS_RESET and a configuration
interrupt) or has ignored it; the session lives, another guest's traffic goes on, and a reset makes
the device as good as new.
"""

from __future__ import annotations

import contextlib
import random
import struct
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
    Guest,
    configs,
    frame,
    guests,
    receive,
)
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES, NetDriver
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfio_user_virtio.testing.driver_queue import Ring

NEXT, WRITE, INDIRECT = 1, 2, 4
RX, TX, CONTROL = 0, 1, 2
pytestmark = pytest.mark.usefixtures("engine")

OUTSIDE = 1 << 60
READ_ONLY = 0x1000_0000
WRITE_ONLY = 0x2000_0000


class Attack:
    """A guest under a hostile driver, and two honest ones."""

    def __init__(self, hostile: Guest, driver: NetDriver, honest: list[NetDriver]) -> None:
        self.hostile = hostile
        self.driver = driver
        self.honest = honest
        self.buffer = hostile.ram.allocate(4096).iova

    async def post(
        self, queue: int, fill: Callable[[Ring, int], None], *, available: int = 1
    ) -> None:
        """Let `fill(ring, buffer)` write descriptors, offer descriptor 0, and notify."""
        driver = self.driver
        ring = driver.queue(queue).ring
        fill(ring, self.buffer)
        ring.set_avail(ring.avail_idx, 0)
        ring.avail_idx = ring.avail_idx + available & 0xFFFF
        await driver.kick(queue)
        if queue == RX:
            await self.honest[0].send(frame(MAC_A, MAC_B, b"bait", size=1000))

    async def asks_for_reset(self) -> bool:
        """Wait for a configuration interrupt; whether the device asks for a reset with it.

        The honest guests are served all the while.
        """
        await self.honest_traffic()
        await self.driver.config_changed(0)
        await self.honest_traffic()
        return bool(await self.hostile.pci.status() & Status.DEVICE_NEEDS_RESET)

    async def is_content(self) -> bool:
        """Whether the device has found nothing wrong, the honest guests having been served."""
        await self.honest_traffic()
        return not await self.hostile.pci.status() & Status.DEVICE_NEEDS_RESET

    async def honest_traffic(self) -> None:
        one, two = self.honest
        await one.send(frame(MAC_C, MAC_B, b"honest"))
        while (await receive(two)).data[14:20] != b"honest":
            pass
        await two.send(frame(MAC_B, MAC_C, b"honest, too"))
        while (await receive(one)).data[14:25] != b"honest, too":
            pass

    async def recover(self) -> None:
        """The device works again after a reset."""
        await self.driver.start()
        one = self.honest[0]
        await self.driver.send(frame(MAC_B, MAC_A, b"reformed"))
        while (await receive(one)).data[14:22] != b"reformed":
            pass
        await one.send(frame(MAC_A, MAC_B, b"welcome"))
        while (await receive(self.driver)).data[14:21] != b"welcome":
            pass
        await self.driver.control.set_rx_mode("promisc", False)


@contextlib.asynccontextmanager
async def attack(
    *, features: int = KNOWN_FEATURES, rx: bool = True, remote: bool = False
) -> AsyncIterator[Attack]:
    members = configs(MAC_A, MAC_B, MAC_C, queue_size=64)
    async with guests(*members, remote=remote, ram_size=1 << 23) as (a, b, c):
        ram = a.ram
        await a.client.dma_map(DmaMapping(READ_ONLY, 4096, DmaAccess.READ, ram.fd, 0))
        await a.client.dma_map(DmaMapping(WRITE_ONLY, 4096, DmaAccess.WRITE, ram.fd, 0))
        honest = [b.driver(), c.driver()]
        for driver in honest:
            await driver.start()
        hostile = a.driver(features=features)
        await hostile.start(rx=rx)
        at = Attack(a, hostile, honest)
        with trio.fail_after(LONG):
            await at.honest_traffic()
            await hostile.send(frame(MAC_B, MAC_A, b"here I am"))
            yield at


def loop_of_two(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 100, NEXT, 1)
    ring.set_descriptor(1, buffer, 100, NEXT, 0)


def loop_of_one(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 0, NEXT, 0)


def writable_loop(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 1, NEXT | WRITE, 1)
    ring.set_descriptor(1, buffer, 1, NEXT | WRITE, 0)


def next_outside(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 100, NEXT, ring.size)


def next_far_outside(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 100, NEXT, 0xFFFF)


def readable_after_writable(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 100, NEXT | WRITE, 1)
    ring.set_descriptor(1, buffer, 100)


def outside_memory(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, OUTSIDE, 100)


def at_the_end_of_everything(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, (1 << 64) - 1, 2000)


def beyond_memory(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, ring.ram.iova + ring.ram.size - 100, 200)


def wrapping_around(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, (1 << 64) - 50, 100)


def write_only_memory(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, WRITE_ONLY, 100)


def indirect_outside(ring: Ring, buffer: int) -> None:
    del buffer
    ring.set_descriptor(0, OUTSIDE, 64, INDIRECT)


def indirect_of_odd_length(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 17, INDIRECT)


def indirect_of_no_length(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 0, INDIRECT)


def indirect_of_huge_length(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 0xFFFF_FFF0, INDIRECT)


def indirect_and_next(ring: Ring, buffer: int) -> None:
    ring.set_descriptor(0, buffer, 16, INDIRECT | NEXT, 1)
    ring.set_descriptor(1, buffer, 16)


def _table(ring: Ring, buffer: int, *entries: tuple[int, int, int, int]) -> None:
    table = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
    ring.ram.view(buffer, len(table))[:] = table
    ring.set_descriptor(0, buffer, len(table), INDIRECT)


def indirect_in_indirect(ring: Ring, buffer: int) -> None:
    _table(ring, buffer, (buffer, 16, INDIRECT, 0))


def indirect_loop(ring: Ring, buffer: int) -> None:
    _table(ring, buffer, (buffer, 1, NEXT, 1), (buffer, 1, NEXT, 0))


def indirect_next_outside(ring: Ring, buffer: int) -> None:
    _table(ring, buffer, (buffer, 1, NEXT, 2), (buffer, 1, 0, 0))


BROKEN_CHAINS = [
    loop_of_two,
    loop_of_one,
    writable_loop,
    next_outside,
    next_far_outside,
    readable_after_writable,
    outside_memory,
    at_the_end_of_everything,
    beyond_memory,
    wrapping_around,
    write_only_memory,
    indirect_outside,
    indirect_of_odd_length,
    indirect_of_no_length,
    indirect_of_huge_length,
    indirect_and_next,
    indirect_in_indirect,
    indirect_loop,
    indirect_next_outside,
]


@pytest.mark.parametrize("fill", BROKEN_CHAINS, ids=lambda fill: fill.__name__)
@pytest.mark.parametrize("queue", [TX, CONTROL])
@pytest.mark.parametrize("remote", [False, True])
async def test_a_broken_chain_asks_for_a_reset(
    fill: Callable[[Ring, int], None], queue: int, *, remote: bool
) -> None:
    async with attack(remote=remote) as at:
        await at.driver.flush()
        await at.post(queue, fill)
        assert await at.asks_for_reset()
        assert at.hostile.member.statistics().driver_errors == 1
        await at.recover()


@pytest.mark.parametrize(
    "fill",
    [fill for fill in BROKEN_CHAINS if fill is not write_only_memory],
    ids=lambda fill: fill.__name__,
)
@pytest.mark.parametrize("remote", [False, True])
async def test_a_broken_receive_chain_harms_nobody(
    fill: Callable[[Ring, int], None], *, remote: bool
) -> None:
    async with attack(rx=False, remote=remote) as at:
        await at.post(RX, fill)
        await at.honest_traffic()
        await at.recover()


async def test_read_only_memory_is_not_written() -> None:
    async with attack(rx=False) as at:
        before = bytes(at.hostile.ram.view(at.hostile.ram.iova, 4096))
        await at.post(RX, lambda ring, _: ring.set_descriptor(0, READ_ONLY, 2048, WRITE))
        await at.honest_traffic()
        after = bytes(at.hostile.ram.view(at.hostile.ram.iova, 4096))
        assert after.count(b"bait") == before.count(b"bait") == 0
        await at.recover()


@pytest.mark.parametrize("queue", [TX, CONTROL])
async def test_a_buffer_of_4_gib_is_dropped(queue: int) -> None:
    async with attack() as at:
        await at.driver.flush()
        await at.post(queue, lambda ring, b: ring.set_descriptor(0, b, 0xFFFF_FFFF))
        await at.honest_traffic()
        await at.recover()


@pytest.mark.parametrize("jump", [65, 1000, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("queue", [TX, CONTROL])
@pytest.mark.parametrize("remote", [False, True])
async def test_an_index_that_jumps_asks_for_a_reset(jump: int, queue: int, *, remote: bool) -> None:
    async with attack(remote=remote) as at:
        await at.driver.flush()
        await at.post(queue, lambda ring, b: ring.set_descriptor(0, b, 60), available=jump)
        assert await at.asks_for_reset()
        await at.recover()


async def test_an_index_that_jumps_on_receive_harms_nobody() -> None:
    async with attack(rx=False) as at:
        await at.post(RX, lambda ring, b: ring.set_descriptor(0, b, 2000, WRITE), available=65)
        await at.honest_traffic()
        await at.recover()


@pytest.mark.parametrize("head", [64, 65, 0xFFFF])
async def test_a_head_that_does_not_exist_asks_for_a_reset(head: int) -> None:
    async with attack() as at:
        await at.driver.flush()
        ring = at.driver.queue(TX).ring
        ring.set_avail(ring.avail_idx, head)
        ring.avail_idx = ring.avail_idx + 1 & 0xFFFF
        await at.driver.kick(TX)
        assert await at.asks_for_reset()
        await at.recover()


async def test_the_same_head_in_every_entry_is_sent_as_often() -> None:
    """A ring full of one descriptor is the driver's own affair."""
    async with attack() as at:
        await at.driver.flush()
        ring = at.driver.queue(TX).ring
        at.hostile.ram.view(at.buffer, 72)[:] = bytes(12) + frame(MAC_B, MAC_A, b"again")
        ring.set_descriptor(0, at.buffer, 72)
        start = ring.avail_idx
        for position in range(ring.size):
            ring.set_avail(start + position, 0)
        ring.avail_idx = start + ring.size & 0xFFFF
        await at.driver.kick(TX)
        for _ in range(ring.size):
            while (await receive(at.honest[0])).data[14:19] != b"again":
                pass
        assert await at.is_content()


async def test_indirect_without_the_feature_asks_for_a_reset() -> None:
    async with attack(features=KNOWN_FEATURES & ~Feature.INDIRECT_DESC.mask) as at:
        await at.driver.flush()
        await at.post(TX, lambda ring, b: _table(ring, b, (b, 60, 0, 0)))
        assert await at.asks_for_reset()
        await at.recover()


@pytest.mark.parametrize(
    "area", [Register.QUEUE_DESC, Register.QUEUE_DRIVER, Register.QUEUE_DEVICE]
)
@pytest.mark.parametrize("address", [OUTSIDE, (1 << 64) - 16, READ_ONLY + 4080, None])
async def test_rings_that_are_not_in_memory(area: Register, address: int | None) -> None:
    async with attack() as at:
        pci, driver = at.hostile.pci, at.driver
        await driver.flush()
        await pci.negotiate(driver.features)
        await pci.write(Register.CONFIG_MSIX_VECTOR, 0)
        ring = driver.queue(TX).ring
        place = ring.desc + 1 if address is None else address
        await pci.enable_queue(TX, ring, vector=2, instead={area: place})
        await pci.driver_ok()
        await driver.kick(TX)
        assert await at.asks_for_reset()
        await at.recover()


@pytest.mark.parametrize("size", [0, 3, 63, 65, 128, 0x8000, 0xFFFF])
async def test_queue_sizes_that_may_not_be_are_not_taken(size: int) -> None:
    async with attack() as at:
        pci = at.hostile.pci
        await pci.negotiate(at.driver.features)
        assert await pci.queue_size(TX) == 64
        await pci.write(Register.QUEUE_SIZE, size)
        assert await pci.queue_size(TX) == 64
        await at.recover()


async def test_queues_and_vectors_that_do_not_exist() -> None:
    async with attack() as at:
        pci = at.hostile.pci
        for index in (3, 100, 0xFFFF):
            assert await pci.queue_size(index) == 0
            await pci.write(Register.QUEUE_DESC, OUTSIDE)
            await pci.write(Register.QUEUE_ENABLE, 1)
            await pci.write(Register.QUEUE_RESET, 1)
        await pci.write(Register.QUEUE_SELECT, TX)
        for vector in (4, 100, 0x7FF, 0xFFFE):
            await pci.write(Register.QUEUE_MSIX_VECTOR, vector)
            assert await pci.read(Register.QUEUE_MSIX_VECTOR) == 0xFFFF
        for offset in range(0, 0x1000, 2):
            data = offset.to_bytes(2, "little")
            await pci.client.region_write(4, 0x3000 + offset, data, no_reply=True)
        assert await at.is_content()
        await at.recover()


async def test_status_bits_in_any_order() -> None:
    generator = random.Random(1)
    async with attack() as at:
        for _ in range(300):
            await at.hostile.pci.set_status(Status(generator.randrange(256)))
        await at.honest_traffic()
        await at.recover()


RANDOM_DESCRIPTOR = st.tuples(
    st.sampled_from([0, 64, 4000, OUTSIDE, READ_ONLY, WRITE_ONLY, (1 << 64) - 8])
    | st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 12, 16, 32, 60, 1600, 70_000, 0xFFFF_FFFF]) | st.integers(0, 2**32 - 1),
    st.integers(0, 7) | st.integers(0, 0xFFFF),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
)


@settings(max_examples=60, deadline=None)
@given(
    queue=st.sampled_from([RX, TX, CONTROL]),
    descriptors=st.lists(RANDOM_DESCRIPTOR, min_size=1, max_size=8),
    heads=st.lists(st.integers(0, 8) | st.integers(0, 0xFFFF), min_size=1, max_size=8),
    step=st.integers(1, 8) | st.integers(0, 0xFFFF),
    content=st.binary(max_size=256),
    remote=st.booleans(),
)
def test_any_ring_at_all_harms_nobody(
    queue: int,
    descriptors: list[tuple[int, int, int, int]],
    heads: list[int],
    step: int,
    content: bytes,
    *,
    remote: bool,
) -> None:
    async def main() -> None:
        async with attack(rx=False, remote=remote) as at:
            await at.driver.flush()
            ring = at.driver.queue(queue).ring
            at.hostile.ram.view(at.buffer, len(content))[:] = content
            for index, (address, length, flags, following) in enumerate(descriptors):
                place = at.buffer + address if address < 4096 else address
                ring.set_descriptor(index, place, length, flags, following)
            for position, head in enumerate(heads):
                ring.set_avail(ring.avail_idx + position, head)
            ring.avail_idx = ring.avail_idx + step & 0xFFFF
            await at.driver.kick(queue)
            await at.honest[0].send(frame(MAC_A, MAC_B, b"bait", size=1000))
            await at.honest_traffic()
            await at.recover()

    trio.run(main)
