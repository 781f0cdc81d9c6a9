"""Things that are done at the same time are not left half done."""

from __future__ import annotations

import pytest
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.vm.together import all_of, both


async def test_they_are_done_at_the_same_time(autojump_clock: trio.testing.MockClock) -> None:
    done = []

    async def job(seconds: float) -> float:
        await trio.sleep(seconds)
        done.append(seconds)
        return seconds

    begun = trio.current_time()
    assert await both(lambda: job(2), lambda: job(1)) == (2, 1)
    assert done == [1, 2]
    assert trio.current_time() - begun == 2


async def test_one_that_fails_does_not_end_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done = []

    async def fail(seconds: float) -> None:
        await trio.sleep(seconds)
        raise HostError(f"after {seconds} s")

    async def job() -> None:
        await trio.sleep(3)
        done.append("whole")

    with pytest.raises(HostError, match="after 1 s"):
        await all_of((lambda: fail(2), lambda: fail(1), job))
    assert done == ["whole"]


async def test_whoever_gives_up_gives_all_of_them_up() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await all_of((trio.sleep_forever, trio.sleep_forever))
    assert scope.cancelled_caught
