"""A served PF and a driver that writes anything anywhere: an answer, or a request for a reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.test_owner_function import QUERY, Driver, a_driver
from vfio_user_virtio.backends.software.owner_function_config import ADMIN_QUEUE
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.admin import STATUS_SIZE
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from collections.abc import Callable

commands = st.builds(
    lambda opcode, group, member, data: (
        opcode.to_bytes(2, "little")
        + group.to_bytes(2, "little")
        + bytes(12)
        + member.to_bytes(8, "little")
        + data
    ),
    st.integers(0, 0x13),
    st.integers(0, 2),
    st.integers(0, 3),
    st.binary(max_size=80),
)
descriptors = st.tuples(
    st.sampled_from([0, 1, 63]),
    st.sampled_from([0, 0x4000_0000, 0x4000_0800, (1 << 64) - 8]),
    st.sampled_from([0, 1, 24, 4096, 0xFFFF_FFFF]),
    st.integers(0, 7),
    st.sampled_from([0, 1, 63, 64, 0xFFFF]),
)


async def until_idle(driver: Driver, condition: Callable[[], bool]) -> bool:
    """Whether it came to that before the device asked for a reset."""
    with trio.fail_after(10):
        while not condition():
            if await driver.pci.status() & Status.DEVICE_NEEDS_RESET:
                return False
    return True


@settings(max_examples=30)
@given(st.lists(commands | st.binary(max_size=40), min_size=1, max_size=20), st.integers(1, 64))
def test_any_command_has_an_answer(sent: list[bytes], room: int) -> None:
    async def main() -> None:
        async with a_driver() as driver:
            await driver.start()
            for readable in sent:
                driver.add(readable.ljust(2, b"\0"), max(room, 2))
            driver.queue.publish()
            await driver.pci.notify(ADMIN_QUEUE)
            assert await until_idle(driver, lambda: driver.queue.used_waiting == len(sent))
            for used in driver.queue.collect():
                assert min(STATUS_SIZE, max(room, 2)) <= used.length <= max(room, 2)

    trio.run(main)


@settings(max_examples=30)
@given(
    st.lists(descriptors, max_size=8),
    st.lists(st.sampled_from([0, 1, 63, 64, 0xFFFF]), max_size=4),
    st.integers(0, 0xFFFF),
)
def test_any_ring_ends_in_an_answer_or_a_reset(
    table: list[tuple[int, int, int, int, int]], heads: list[int], available: int
) -> None:
    async def main() -> None:
        async with a_driver() as driver:
            await driver.start()
            ring = driver.queue.ring
            for descriptor in table:
                ring.set_descriptor(*descriptor)
            for position, head in enumerate(heads):
                ring.set_avail(position, head)
            ring.avail_idx = available
            await driver.pci.notify(ADMIN_QUEUE)
            await until_idle(driver, lambda: ring.used_idx == ring.avail_idx)
            assert await driver.pci.read(Register.ADMIN_QUEUE_NUM) == 1
            await driver.start()
            assert (await driver.send(QUERY)).ok

    trio.run(main)
