"""The software owner's administration virtqueue: order, and the model of a slow device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tests.backends.administration_rig import Driver, a_config, ready
from vfio_user_virtio.backends.software.admin_queue import DeviceTiming, SoftwareAdminQueue
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import encode_command
from vfio_user_virtio.virtio.admin_commands import ObjectKind

if TYPE_CHECKING:
    from trio.testing import MockClock

    from vfio_user_virtio.virtio.admin import Command

SLOW = DeviceTiming(first_set=0.3, similar_set=0.011, command=0.001)


async def seconds(queue: SoftwareAdminQueue, command: Command) -> float:
    before = trio.current_time()
    written = await queue.execute(encode_command(command), 8)
    assert written == bytes(8)
    return round(trio.current_time() - before, 6)


async def test_without_a_model_nothing_takes_time(autojump_clock: MockClock) -> None:
    driver = ready()
    queue = SoftwareAdminQueue(driver.device)
    assert await seconds(queue, commands.mode_set(1, stopped=True)) == 0
    assert driver.member().mode.stopped
    assert await seconds(queue, commands.parts_set(1, 6, b"")) == 0


async def test_the_first_set_with_an_object_is_slow(autojump_clock: MockClock) -> None:
    queue = SoftwareAdminQueue(ready(a_config(1), a_config(2)).device, SLOW)
    for member in (1, 2):
        assert await seconds(queue, commands.mode_set(member, stopped=True)) == 0.001
    assert await seconds(queue, commands.parts_set(1, 6, b"")) == 0.3
    assert await seconds(queue, commands.parts_set(1, 6, b"")) == 0.011
    assert await seconds(queue, commands.object_create(2, 7, ObjectKind.SET)) == 0.001
    assert await seconds(queue, commands.parts_set(2, 7, b"")) == 0.3
    await seconds(queue, commands.object_destroy(1, 6))
    await seconds(queue, commands.object_create(1, 6, ObjectKind.SET))
    assert await seconds(queue, commands.parts_set(1, 6, b"")) == 0.3


async def test_a_refused_command_takes_no_longer_than_any(autojump_clock: MockClock) -> None:
    queue = SoftwareAdminQueue(ready().device, SLOW)
    before = trio.current_time()
    for writable in (0, 8):
        await queue.execute(encode_command(commands.parts_set(1, 6, b"")), writable)
    assert round(trio.current_time() - before, 6) == 0.002


async def test_one_at_a_time_for_a_member_and_all_members_at_once(
    autojump_clock: MockClock,
) -> None:
    driver = Driver(*(a_config(number) for number in range(1, 9)))
    driver.set_up()
    queue = SoftwareAdminQueue(driver.device, SLOW)
    done: list[tuple[int, float]] = []

    async def twice(member: int) -> None:
        for stop in (True, False):
            await seconds(queue, commands.mode_set(member, stopped=stop))
            done.append((member, round(trio.current_time() - start, 6)))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for member in range(1, 9):
            nursery.start_soon(twice, member)
            nursery.start_soon(twice, member)
        nursery.start_soon(queue.execute, b"", 8)
    assert trio.current_time() - start < 0.005
    assert sorted(done) == [
        (member, 0.001 * step) for member in range(1, 9) for step in (1, 2, 3, 4)
    ]
