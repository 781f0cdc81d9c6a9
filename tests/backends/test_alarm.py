"""The alarm: it goes off once, at the earliest time it was set to, and sleeps otherwise."""

from __future__ import annotations

import trio
import trio.testing

from vfio_user_virtio.backends.software.alarm import Alarm


async def test_it_goes_off_at_the_earliest_time(autojump_clock: trio.testing.MockClock) -> None:
    alarm = Alarm()
    times: list[float] = []
    begin = trio.current_time()

    def expired() -> None:
        times.append(trio.current_time() - begin)
        if len(times) == 2:
            alarm.set(7)

    alarm.set(50)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alarm.run, expired)
        await trio.sleep(1)
        alarm.set(2)
        alarm.set(4)
        await trio.sleep(9)
        assert times == [3]
        await trio.sleep(990)
        assert times == [3]
        alarm.set(0)
        await trio.sleep(500)
        assert times == [3, 1_000, 1_007]
        nursery.cancel_scope.cancel()
