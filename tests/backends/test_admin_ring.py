"""The driver's side of an administration virtqueue, against a device in the same memory."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.admin_ring import AdminRing, Arena
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.admin_client import AdminError
from vfio_user_virtio.virtio.split_queue import SplitQueue, ring_layout

if TYPE_CHECKING:
    from vfio_user_virtio.virtio.split_queue import Chain

IOVA: Final = 0x10_0000
MEMORY: Final = 1 << 20


class Device:
    """A device that does what it is told, and the ring that it is on."""

    def __init__(self, size: int = 8, memory: int = MEMORY) -> None:
        self.memory = memoryview(mmap.mmap(-1, memory))
        self.kicks = 0
        self.ring = AdminRing(self.memory, IOVA, size, self._kick)
        addresses, layout = self.ring.addresses, ring_layout(size)
        self.queue = SplitQueue(
            size,
            self._view(addresses.desc, layout.desc),
            self._view(addresses.driver, layout.avail),
            self._view(addresses.device, layout.used),
            views_of=lambda iova, length, _: [self._view(iova, length)],
            event_idx=False,
            indirect=False,
        )

    def _view(self, iova: int, size: int) -> memoryview:
        assert 0 <= iova - IOVA <= len(self.memory) - size
        return self.memory[iova - IOVA : iova - IOVA + size]

    async def _kick(self) -> None:
        self.kicks += 1

    def take(self) -> Chain:
        chain = self.queue.take()
        assert chain is not None
        return chain

    def answer(self, chain: Chain, data: bytes) -> None:
        chain.writable[0][: len(data)] = data
        self.queue.put(chain.head, len(data))
        self.queue.publish()
        self.ring.collect()


async def sent(
    device: Device, count: int, results: dict[int, bytes], nursery: trio.Nursery
) -> None:
    """Send command n, n bytes long, for n from 1 to `count`."""

    async def send(number: int) -> None:
        results[number] = await device.ring.execute(bytes([number] * number), 16)

    for number in range(1, count + 1):
        nursery.start_soon(send, number)
        await trio.testing.wait_all_tasks_blocked()


async def test_commands_go_out_and_answers_come_back_in_any_order() -> None:
    device, results = Device(), dict[int, bytes]()
    async with trio.open_nursery() as nursery:
        await sent(device, 3, results, nursery)
        chains = [device.take() for _ in range(3)]
        assert [bytes(chain.readable[0]) for chain in chains] == [b"\1", b"\2\2", b"\3\3\3"]
        assert [len(chain.writable[0]) for chain in chains] == [16, 16, 16]
        for number in (2, 0, 1):
            device.answer(chains[number], f"answer {number + 1}".encode())
    assert results == {1: b"answer 1", 2: b"answer 2", 3: b"answer 3"}
    assert (device.kicks, device.ring.outstanding) == (3, 0)


async def test_a_device_that_looks_anyway_is_not_told() -> None:
    device = Device()
    device.queue.disable_kicks()
    async with trio.open_nursery() as nursery:
        await sent(device, 1, {}, nursery)
        device.answer(device.take(), b"")
    assert device.kicks == 0


async def test_a_full_ring_makes_the_next_wait_in_order() -> None:
    device, results = Device(size=4), dict[int, bytes]()
    async with trio.open_nursery() as nursery:
        await sent(device, 4, results, nursery)
        assert device.ring.outstanding == 2
        for number in range(1, 5):
            chain = device.take()
            assert bytes(chain.readable[0]) == bytes([number] * number)
            device.answer(chain, bytes([number]))
            await trio.testing.wait_all_tasks_blocked()
    assert results == {number: bytes([number]) for number in range(1, 5)}


async def test_full_memory_makes_the_next_wait() -> None:
    device = Device(size=16, memory=1 << 14)
    results = []

    async def send() -> None:
        results.append(await device.ring.execute(bytes(6000), 16))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert device.ring.outstanding == 2
        for _ in range(4):
            device.answer(device.take(), b"x")
            await trio.testing.wait_all_tasks_blocked()
    assert results == [b"x"] * 4


async def test_what_is_given_up_keeps_its_buffers_until_the_device_is_done() -> None:
    device = Device(size=4)
    async with trio.open_nursery() as nursery:
        await sent(device, 1, {}, nursery)
        nursery.cancel_scope.cancel()
    chain = device.take()
    assert bytes(chain.readable[0]) == b"\1"
    assert (device.ring.outstanding, device.ring.abandoned) == (1, 1)
    async with trio.open_nursery() as nursery:
        await sent(device, 1, results := dict[int, bytes](), nursery)
        other = device.take()
        chain.writable[0][:] = b"!" * 16  # late, and harmless
        device.answer(other, b"mine")
        await trio.testing.wait_all_tasks_blocked()
        assert results == {1: b"mine"}
        device.answer(chain, b"late")
    assert (device.ring.outstanding, device.ring.abandoned) == (0, 0)
    await test_a_full_ring_makes_the_next_wait_in_order()


async def test_an_answer_shows_nothing_of_earlier_ones() -> None:
    device, results = Device(), list[bytes]()

    async def send() -> None:
        results.append(await device.ring.execute(b"x", 16))

    for data in (b"a secret answer!", b"a"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            chain = device.take()
            assert bytes(chain.writable[0]) == bytes(16)
            device.answer(chain, data)
    assert results == [b"a secret answer!", b"a"]


@pytest.mark.parametrize("size", [0, limits.MAX_ADMIN_COMMAND_SIZE + 1])
async def test_a_command_that_cannot_go_is_refused(size: int) -> None:
    device = Device()
    for readable, writable in ((size, 8), (8, size)):
        with pytest.raises(AdminError, match=f"{size} bytes") as caught:
            await device.ring.execute(bytes(readable), writable)
        assert caught.value.errno == errno.EMSGSIZE
    assert device.ring.outstanding == 0


@pytest.mark.parametrize(
    ("head", "length", "problem"),
    [(0, 8, "descriptor 0 given back"), (0x1_0000, 8, "given back"), (None, 17, "17 bytes")],
)
async def test_a_device_that_breaks_the_rules_is_done_with(
    head: int | None, length: int, problem: str
) -> None:
    device = Device()
    failures = []

    async def send() -> None:
        try:
            await device.ring.execute(b"x", 16)
        except HostError as error:
            failures.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        chain = device.take()
        device.queue.put(chain.head if head is None else head, length)
        device.queue.publish()
        with pytest.raises(HostError, match=problem):
            device.ring.collect()
    assert len(failures) == 2
    assert all(problem in failure for failure in failures)
    with pytest.raises(HostError, match=problem):
        await device.ring.execute(b"x", 16)
    device.ring.collect()


async def test_a_reset_ends_those_who_wait_for_room_too() -> None:
    device, failures = Device(size=2), list[str]()

    async def send() -> None:
        try:
            await device.ring.execute(b"x", 16)
        except HostError as error:
            failures.append(str(error))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        device.ring.fail(HostError("reset"))
    assert failures == ["reset"] * 3


async def test_indices_wrap() -> None:
    device = Device(size=2)
    device.ring._next_avail = device.ring._next_used = 0xFFFE
    device.queue.start(0xFFFE, 0xFFFE)
    device.ring._write_u16(device.ring._used + 2, 0xFFFE)
    for number in range(4):
        async with trio.open_nursery() as nursery:
            await sent(device, 1, results := dict[int, bytes](), nursery)
            device.answer(device.take(), bytes([number]))
        assert results == {1: bytes([number])}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60))
def test_pieces_of_an_arena_never_overlap(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(100, 100 + 4096)
    taken: dict[int, int] = {}
    for take, number in steps:
        if take:
            start = arena.take(number)
            if start is None:
                continue
            assert 100 <= start <= start + number <= 100 + 4096
            assert all(
                start + number <= other or other + size <= start for other, size in taken.items()
            )
            taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            arena.give_back(start)
            del taken[start]
    for start in taken:
        arena.give_back(start)
    assert arena.take(3900) == 128
